import pytest

from auto_round.calibration import DATASETS
from auto_round.calibration.named import DEFAULT_DATASET

REFERENCE_NAMES = [
    "NeelNanda/pile-10k",
    "pile-10k",
    "swift/pile-val-backup",
    "BAAI/CCI3-HQ",
    "codeparrot/github-code-clean",
    "HuggingFaceH4/ultrachat_200k",
    "openbmb/Ultra-FineWeb",
    "madao33/new-title-chinese",
    "mbpp",
    "wikitext2",
    "allenai/c4",
]
ROW = {"text": "1", "content": "2", "code": "3", "messages": [{"role": "user", "content": "4"}]}


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_reference_names_are_known(name):
    assert name in DATASETS


@pytest.mark.parametrize("name", list(DATASETS))
def test_entries_are_complete(name):
    entry = DATASETS[name]
    assert entry.hub_path.count("/") == 1
    assert entry.default_splits
    assert entry.document(ROW)


def test_the_default_is_registered():
    assert DATASETS[DEFAULT_DATASET].hub_path == "NeelNanda/pile-10k"


@pytest.mark.parametrize(
    ("name", "document"),
    [("pile-10k", "1"), ("openbmb/Ultra-FineWeb", "2"), ("codeparrot/github-code-clean", "3"), ("mbpp", "1\n3")],
)
def test_the_text_of_a_row(name, document):
    assert DATASETS[name].document(ROW) == document
