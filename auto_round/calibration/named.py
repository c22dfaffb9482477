"""The datasets that `--dataset` knows by name. Importing this module fills `DATASETS`; nothing is loaded.

Fields and splits are those of the dataset cards on https://huggingface.co/datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.calibration.base import DATASETS, Document, NamedDataset

DEFAULT_DATASET = "NeelNanda/pile-10k"


def _text(row: Mapping[str, Any]) -> Document:
    return row["text"]


def _content(row: Mapping[str, Any]) -> Document:
    return row["content"]


def _code(row: Mapping[str, Any]) -> Document:
    return row["code"]


def _messages(row: Mapping[str, Any]) -> Document:
    return row["messages"]


def _task_with_solution(row: Mapping[str, Any]) -> Document:
    return f"{row['text']}\n{row['code']}"


DATASETS.register(DEFAULT_DATASET, "pile-10k")(NamedDataset("NeelNanda/pile-10k", _text))

# swift/pile-val-backup is the ModelScope copy of this repository: the validation part of the Pile, 214,670 documents.
DATASETS.register("swift/pile-val-backup", "mit-han-lab/pile-val-backup", "pile-val-backup")(
    NamedDataset("mit-han-lab/pile-val-backup", _text, default_splits=("validation",), is_streamed=True)
)

DATASETS.register("BAAI/CCI3-HQ")(NamedDataset("BAAI/CCI3-HQ", _text, is_streamed=True))

DATASETS.register("codeparrot/github-code-clean")(
    NamedDataset("codeparrot/github-code-clean", _code, is_streamed=True, parquet_files="data/*.parquet")
)

DATASETS.register("HuggingFaceH4/ultrachat_200k")(
    NamedDataset("HuggingFaceH4/ultrachat_200k", _messages, default_splits=("train_sft",), is_streamed=True)
)

DATASETS.register("openbmb/Ultra-FineWeb")(
    NamedDataset("openbmb/Ultra-FineWeb", _content, default_splits=("en",), is_streamed=True)
)

DATASETS.register("madao33/new-title-chinese")(NamedDataset("madao33/new-title-chinese", _content))

DATASETS.register("mbpp", "google-research-datasets/mbpp")(
    NamedDataset(
        "google-research-datasets/mbpp",
        _task_with_solution,
        config_name="full",
        default_splits=("train", "validation", "test"),
    )
)

# Its rows are lines of articles.
DATASETS.register("wikitext2", "Salesforce/wikitext")(
    NamedDataset("Salesforce/wikitext", _text, config_name="wikitext-2-raw-v1", row_separator="\n\n")
)

DATASETS.register("allenai/c4", "c4")(NamedDataset("allenai/c4", _text, config_name="en", is_streamed=True))
