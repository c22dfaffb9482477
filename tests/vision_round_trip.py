"""What is done with each family of tiny vision-language models for the table in docs/vision_language.md.

Every cell is computed: a model is quantized, written in three formats, loaded by Transformers, and its logits for text
and for a picture are compared with those of the dequantized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoRoundConfig
from vision_families import VisionFamily

from auto_round import AutoRound
from auto_round.formats import EXPORTERS
from auto_round.formats.base import check
from auto_round.models.auto_class import auto_class

FORMATS = ("auto_round", "auto_gptq", "llm_compressor")
COLUMNS = {
    "W4 tuned on text": {"bits": 4, "iters": 1},
    "W2 rounded": {"bits": 2, "iters": 0},
    "W4 tuned on pictures": {"bits": 4, "iters": 1, "dataset": "pictures"},
    "vision tower too": {"bits": 4, "iters": 1, "dataset": "pictures", "quant_nontext_module": True},
}
WRITTEN = {"W4 tuned on pictures": ("auto_round",), "vision tower too": ("auto_round", "llm_compressor")}
# Biases of quantized layers are written in float16, 11 bits against 24, and add up over the layers.
TOLERANCE = 2e-3
YES, NO = "yes", "no"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "vision_language.md"
# What goes wrong -> the footnote of the page that says why.
FOOTNOTES = {"AttributeError": "a", "UnsupportedError": "b", "ValueError": "c"}

RunOptions = dict[str, Any]


def row(family: VisionFamily, folder: Path) -> dict[str, dict[str, str]]:
    """Returns column -> format -> "yes", or why not."""
    family.model().save_pretrained(folder / "model")
    return {name: column(family, folder, name) for name in COLUMNS}


def column(family: VisionFamily, folder: Path, name: str) -> dict[str, str]:
    """Returns format -> "yes", or why not, for one way of quantizing."""
    formats = WRITTEN.get(name, FORMATS)
    options = run_options(family, COLUMNS[name])
    rounder = AutoRound(str(folder / "model"), **options)
    found = {kind: outcome(lambda kind=kind: check(rounder.plan, [EXPORTERS[kind]])) for kind in formats}
    held = [kind for kind in formats if found[kind] == YES]
    _, (dense, *packed) = rounder.quantize_and_save(folder / name, format=",".join(("fake", *held)))
    expected = logits(family, dense, None)
    for kind, place in zip(held, packed, strict=True):
        found[kind] = outcome(lambda place=place, kind=kind: compare(family, place, kind, expected))
    return found


def table_row(family: VisionFamily, cells: dict[str, dict[str, str]]) -> str:
    """Returns the line of the page's table for a family."""
    words = [family.title, f"`{family.architecture}`", f"`{family.blocks}`"]
    return "| " + " | ".join([*words, *map(cell, cells.values()), family.note]) + " |"


def cell(outcomes: dict[str, str]) -> str:
    """Returns what the table says of some formats: what does not work, with a footnote; "yes" if all do."""
    failed = {kind: found.removeprefix(f"{NO}: ") for kind, found in outcomes.items() if found != YES}
    if not failed:
        return YES
    return "not " + ", ".join(f"{kind} ({FOOTNOTES.get(why, why)})" for kind, why in failed.items())


def with_rows(page: str, rows: dict[str, str]) -> str:
    """Returns the page with some rows in place of those of the same family."""
    lines = page.split("\n")
    for line in rows.values():
        start = "|".join(line.split("|")[:3])
        old = next((index for index, other in enumerate(lines) if other.startswith(start)), None)
        if old is None:
            end = max(index for index, other in enumerate(lines) if other.startswith("|"))
            lines.insert(end + 1, line)
        else:
            lines[old] = line
    return "\n".join(lines)


def run_options(family: VisionFamily, changes: RunOptions) -> RunOptions:
    """Returns keyword arguments of AutoRound for a tiny model."""
    data: Any = family.text(4)
    if changes.get("dataset") == "pictures":
        data = [family.with_picture(tokens=14 + 2 * index, seed=index) for index in range(4)]
    common = {"group_size": 32, "nsamples": 4, "seqlen": 48, "batch_size": 2, "device": "cpu"}
    return {**common, **changes, "dataset": data}


def compare(family: VisionFamily, place: Path, kind: str, expected: list[torch.Tensor]) -> None:
    """Raises AssertionError if logits of a written folder are not those of the dequantized weights."""
    for what, found, wanted in zip(("text", "picture"), logits(family, place, kind), expected, strict=True):
        difference = float((found - wanted).abs().max())
        assert difference < TOLERANCE * float(wanted.abs().max()), f"logits of the {what} differ by {difference:.3g}"


@torch.no_grad()
def logits(family: VisionFamily, place: Path, kind: str | None) -> list[torch.Tensor]:
    """Returns the logits of a text and of a text with a picture, from a folder loaded by Transformers."""
    exact = {} if kind in (None, "llm_compressor") else {"quantization_config": AutoRoundConfig(backend="torch")}
    loader = auto_class(AutoConfig.from_pretrained(place))
    model = loader.from_pretrained(place, dtype=torch.float32, **exact).eval()
    assert type(model).__name__ == family.architecture
    return [model(input_ids=family.text(2)).logits, model(**family.with_picture(seed=9)).logits]


def outcome(attempt: Callable[[], None]) -> str:
    """Returns "yes", or the first line of what went wrong."""
    try:
        attempt()
    except Exception as error:  # the point is to say what happens
        return f"{NO}: {type(error).__name__}"
    return YES
