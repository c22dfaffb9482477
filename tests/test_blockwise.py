"""The walk over the blocks; what comes out of a whole run is in test_pipeline.py."""

from __future__ import annotations

import pytest
import torch

from auto_round import blockwise
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.session import open_session
from auto_round.store import RunStore
from auto_round.tuning import round_plain


def test_seeds_of_blocks_depend_on_seed_and_name():
    seeds = {blockwise.block_seed(seed, name) for seed in (1, 2) for name in ("model.layers.0", "model.layers.1")}
    assert len(seeds) == 4
    assert blockwise.block_seed(1, "model.layers.0") == blockwise.block_seed(1, "model.layers.0")


def test_a_failure_to_write_a_block_ends_the_run(make_model, token_ids, tmp_path, monkeypatch):
    """Blocks are written beside the tuning of the next one, which must not hide that it failed."""
    data = CalibrationSet(token_ids(4, 16))
    options = {"iters": 1, "batch_size": 2, "group_size": 32, "device": "cpu", "output_dir": str(tmp_path / "out")}
    session = open_session(RunConfig.from_options(model=make_model(), dataset=data, **options))
    store = RunStore(tmp_path / "work", {}, resume=False)

    def full(*_result):
        raise OSError("no space left")

    monkeypatch.setattr(RunStore, "save", full)
    with pytest.raises(OSError, match="no space left"):
        blockwise.tune_everything(session, store, data)


def test_blocks_are_rounded_to_what_each_weight_gives_by_itself(make_model, tmp_path):
    model = make_model()
    options = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}
    session = open_session(RunConfig.from_options(model=model, output_dir=str(tmp_path / "out"), **options))
    store = RunStore(tmp_path / "work", {}, resume=False)
    blockwise.round_everything(session, store)
    assert list(store.finished()) == [group[0] for group in session.plan.groups]
    for name, entry in session.plan.quantized().items():
        block = next(group[0] for group in session.plan.groups if name.startswith(f"{group[0]}."))
        expected = round_plain(model.get_parameter(name).detach().float(), entry.scheme)
        assert torch.equal(store.load(block).weights[name].codes, expected.codes)
