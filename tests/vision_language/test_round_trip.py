"""The table of docs/vision_language.md is true: every cell is computed anew from a tiny model of the family."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vision_families import FAMILIES
from vision_round_trip import COLUMNS, PAGE, row, run_options, table_row

from auto_round import AutoRound


@pytest.fixture(params=FAMILIES)
def family(request):
    found = FAMILIES[request.param]
    if not found.is_there:
        pytest.skip(f"this Transformers has no {found.architecture}")
    return found


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_the_page_says_what_works(family, tmp_path):
    assert table_row(family, row(family, tmp_path)) in PAGE.read_text(encoding="utf-8").split("\n")


@pytest.mark.usefixtures("quiet")
def test_a_folder_gives_the_bytes_that_a_model_in_memory_does(family, tmp_path):
    """On text. A vision tower mapped from a file may sum in another order (alignment), and ties fall otherwise."""
    options = run_options(family, COLUMNS["W2 rounded"])
    family.model().save_pretrained(tmp_path / "model")
    AutoRound(str(tmp_path / "model"), **options).quantize_and_save(tmp_path / "streamed")
    AutoRound(family.model(), **options).quantize_and_save(tmp_path / "memory")
    streamed, memory = (load_file(next(Path(tmp_path / name).glob("*.safetensors"))) for name in ("streamed", "memory"))
    assert streamed.keys() == memory.keys()
    different = [key for key, tensor in streamed.items() if not torch.equal(tensor, memory[key])]
    assert not different
