"""Reads named datasets of the Hugging Face hub through the optional package `datasets`.

Without a connection `datasets` retries for minutes; here one short question is asked first and the error comes at once.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from auto_round.calibration.base import Document, NamedDataset, ReadLimit, count_chars
from auto_round.errors import CalibrationError, require

PROBE_SECONDS = 5.0


def read_hub_documents(entry: NamedDataset, splits: Sequence[str], limit: ReadLimit) -> list[Document]:
    """Returns documents of a named dataset, in its order: all, or the first ones up to `limit` if it is streamed.

    Args:
        splits: empty for the dataset's default.
    Raises:
        MissingDependencyError: the package `datasets` is not installed.
        CalibrationError: the dataset can be neither reached nor found in the local cache, or its rows are not what
            the registration says.
    """
    require("datasets", needed_for=f"the dataset {entry.hub_path}", install="datasets")
    is_online = _check_reachable(entry)
    rows = chain.from_iterable(
        _read_rows(entry, split, is_streamed=entry.is_streamed and is_online)
        for split in splits or entry.default_splits
    )
    documents = (_document(entry, row) for row in rows)
    if entry.row_separator is not None:
        return [entry.row_separator.join(text for text in documents if isinstance(text, str))]
    return take_documents(documents, limit) if entry.is_streamed else list(documents)


def take_documents(documents: Iterable[Document], limit: ReadLimit) -> list[Document]:
    """Returns the first documents up to `limit`; those after it are never read."""
    taken: list[Document] = []
    n_chars = 0
    for document in documents:
        taken.append(document)
        n_chars += count_chars(document)
        if limit.is_reached(n_documents=len(taken), n_chars=n_chars):
            break
    return taken


def _check_reachable(entry: NamedDataset) -> bool:
    """Returns whether the hub is to be asked; False when only the local cache can serve.

    Raises:
        CalibrationError: the hub does not answer and the cache does not hold the dataset.
    """
    import datasets
    from huggingface_hub import constants

    if datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(f"{constants.ENDPOINT}/api/datasets/{entry.hub_path}", method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it answers; what is wrong is said better by `datasets`
    except OSError as error:
        # A certificate that only Python's own store misses does not stop `datasets`.
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return True
        if _is_cached(entry, Path(datasets.config.HF_DATASETS_CACHE)):
            return False
        raise _unreachable(entry, f"{constants.ENDPOINT} does not answer: {error}") from error


def _is_cached(entry: NamedDataset, cache: Path) -> bool:
    # Folders are `owner___name`, the name in snake case for some versions and datasets.
    wanted = entry.hub_path.replace("/", "").replace("_", "").lower()
    return cache.is_dir() and any(folder.name.replace("_", "").lower() == wanted for folder in cache.iterdir())


def _read_rows(entry: NamedDataset, split: str, *, is_streamed: bool) -> Iterator[Mapping[str, Any]]:
    import datasets

    source: dict[str, Any] = {"path": entry.hub_path, "name": entry.config_name}
    if entry.parquet_files is not None:
        source = {"path": "parquet", "data_files": f"hf://datasets/{entry.hub_path}/{entry.parquet_files}"}
    try:
        yield from datasets.load_dataset(**source, split=split, streaming=is_streamed)
    except Exception as error:  # the HTTP library below `datasets` changes with its version, and so do its errors
        raise _unreachable(entry, f"split {split}: {type(error).__name__}: {error}") from error


def _document(entry: NamedDataset, row: Mapping[str, Any]) -> Document:
    try:
        return entry.document(row)
    except KeyError as error:
        keys = ", ".join(row)
        raise CalibrationError(f"dataset {entry.hub_path} has no field {error}; its rows have {keys}") from error


def _unreachable(entry: NamedDataset, reason: str) -> CalibrationError:
    return CalibrationError(
        f"dataset {entry.hub_path} could not be read ({reason}). Give local text with --dataset FILE "
        "(.json, .jsonl or .txt), or load the dataset once where there is a network, copy the cache (HF_HOME) "
        "and set HF_DATASETS_OFFLINE=1"
    )
