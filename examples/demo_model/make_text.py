"""Write the calibration and evaluation text of the demo model, from documents its training never sees.

The rule that holds a document out (`partition_of`) depends on nothing but its text, so `train.py`, this script and
anyone who owns the corpus agree on the split without a list of documents. The corpus is a jsonl or jsonl.xz file with
one {"source": ..., "text": ...} a line.

    python examples/demo_model/make_text.py --corpus demo_corpus.jsonl.xz --out examples/demo_model
"""

import argparse
import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# One document in ten: the smallest share that leaves every source enough text for both files (OpenStax has 285
# documents only).
HELD_OUT_DIVISOR = 10

# What the corpus was collected as, source by source. Its rows carry no licence field. None: the licence differs from
# document to document, and only a document that names a licence of STATED_LICENCES in its own text is redistributed.
SOURCE_LICENCES: dict[str, str | None] = {
    "wikipedia": "CC BY-SA",
    "wikitext2_train": "CC BY-SA",
    "novels": "public domain",
    "openstax": "CC BY",
    "techdocs": None,
    "python": None,
}
STATED_LICENCES = (
    ("CC0", re.compile(r"waived via\s+\[?CC0|CC0-1\.0-Universal")),
    ("public domain", re.compile(r"This document (has been|is) placed in the\s+public domain")),
    ("Apache-2.0", re.compile(r"SPDX-License-Identifier: Apache-2\.0|under the Apache License,? (Version )?2\.0")),
)
# "Over the River" (Galsworthy, 1933) is labelled public domain but is not so everywhere; its excerpts stay out.
WITHHELD = re.compile(r"\b(Dornford|Condaford)\b")


@dataclass(frozen=True)
class Document:
    """One row of the corpus."""

    source: str
    text: str


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a held-out document, with what its licence asks to keep beside it."""

    source: str
    licence: str
    attribution: str
    text: str


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a jsonl or jsonl.xz corpus, without the empty ones."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["text"].strip():
                yield Document(source=row.get("source", "unknown"), text=row["text"])


def partition_of(text: str) -> str:
    """Return "train", "calib" or "eval": the one use that a document with this text may have."""
    digest = int(hashlib.sha1(text.encode("utf-8")).hexdigest(), 16)
    if digest % HELD_OUT_DIVISOR != 0:
        return "train"
    return "calib" if digest // HELD_OUT_DIVISOR % 2 == 0 else "eval"


def licence_of(document: Document) -> str | None:
    """Return the licence under which a document may be passed on, or None if neither source nor text tells."""
    if WITHHELD.search(document.text):
        return None
    licence = SOURCE_LICENCES.get(document.source)
    if licence is not None:
        return licence
    stated = [name for name, pattern in STATED_LICENCES if pattern.search(document.text)]
    return stated[0] if stated else None


def attribution_of(document: Document) -> str:
    """Return whom to credit as far as the row tells: the article or section title, or the copyright lines."""
    title = document.text.strip().split("\n", 1)[0].strip("= #")
    match document.source:
        case "wikipedia":
            return f"Wikipedia contributors, '{title}'"
        case "wikitext2_train":
            return f"Wikipedia contributors, '{title}' (through WikiText-2)"
        case "openstax":
            return f"OpenStax, '{title}'"
        case "python":
            notices = re.findall(r"^.*(?:Copyright|FileCopyrightText).*$", document.text, flags=re.MULTILINE)
            return "; ".join(notice.strip("#\"' ") for notice in notices[:3])
        case _:
            return ""


def cut_at_paragraph(text: str, limit: int) -> str:
    """Return the beginning of a text, at most `limit` characters long, ending at a paragraph or else a line border."""
    if len(text) <= limit:
        return text.strip()
    for border in ("\n\n", "\n", " "):
        end = text.rfind(border, limit // 2, limit)
        if end > 0:
            return text[:end].strip()
    return text[:limit].strip()


def excerpts_of(documents: Iterable[Document], limit: int) -> Iterator[Excerpt]:
    """Yield one excerpt for each document whose licence is known."""
    for document in documents:
        licence = licence_of(document)
        if licence is not None:
            text = cut_at_paragraph(document.text, limit)
            yield Excerpt(document.source, licence, attribution_of(document), text)


def select_evenly(excerpts: Iterable[Excerpt], total_bytes: int) -> list[Excerpt]:
    """Choose excerpts of about `total_bytes` UTF-8 bytes in all, as evenly over the sources as their stock allows.

    A source that has given fewer bytes than the others is always served next, so any prefix of the result is mixed as
    evenly as the whole. A source that runs out leaves its share to the others. Within a source the order is that of
    the texts' sha1, which does not depend on the order of the corpus.
    """
    stock: dict[str, list[Excerpt]] = {}
    for excerpt in excerpts:
        stock.setdefault(excerpt.source, []).append(excerpt)
    for queue in stock.values():
        queue.sort(key=lambda excerpt: hashlib.sha1(excerpt.text.encode("utf-8")).hexdigest(), reverse=True)

    given = dict.fromkeys(sorted(stock), 0)
    chosen: list[Excerpt] = []
    missing = total_bytes
    while given and missing > 0:
        source = min(given, key=lambda name: given[name])
        if not stock[source]:
            del given[source]
            continue
        excerpt = stock[source].pop()
        n_bytes = len(excerpt.text.encode("utf-8"))
        given[source] += n_bytes
        missing -= n_bytes
        chosen.append(excerpt)
    return chosen


def report(name: str, excerpts: list[Excerpt]) -> None:
    """Print how many excerpts and bytes of each source a file holds."""
    for source in sorted({excerpt.source for excerpt in excerpts}):
        sizes = [len(excerpt.text.encode("utf-8")) for excerpt in excerpts if excerpt.source == source]
        print(f"{name}: {source:16s} {len(sizes):4d} excerpts {sum(sizes):7d} bytes")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="jsonl or jsonl.xz, one {source, text} a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for calib.jsonl and eval.txt")
    parser.add_argument("--calib_bytes", type=int, default=500_000)
    parser.add_argument("--eval_bytes", type=int, default=150_000)
    parser.add_argument("--excerpt_chars", type=int, default=6000, help="longer documents are cut at a paragraph")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    partitions: dict[str, list[Document]] = {"train": [], "calib": [], "eval": []}
    for document in read_documents(arguments.corpus):
        partitions[partition_of(document.text)].append(document)

    calib = select_evenly(excerpts_of(partitions["calib"], arguments.excerpt_chars), arguments.calib_bytes)
    evaluation = select_evenly(excerpts_of(partitions["eval"], arguments.excerpt_chars), arguments.eval_bytes)

    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(asdict(excerpt), ensure_ascii=False) for excerpt in calib]
    (arguments.out / "calib.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (arguments.out / "eval.txt").write_text("\n\n".join(e.text for e in evaluation) + "\n", encoding="utf-8")
    report("calib.jsonl", calib)
    report("eval.txt", evaluation)


if __name__ == "__main__":
    main()
