"""Sessions of tiny models that ask for mixed bits."""

from __future__ import annotations

import pytest

from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.session import open_session

THREE = "W2A16G32,W4A16G32,W8A16G32"


@pytest.fixture
def open_mixed(make_model, token_ids, tmp_path):
    """Returns make(kind, **options) -> a session; 3.5 bits of 2, 4 and 8 unless told otherwise."""

    def make(kind="llama", *, model=None, **options):
        given = {
            "model": make_model(kind) if model is None else model,
            "dataset": CalibrationSet(token_ids(6, 12)),
            "output_dir": str(tmp_path / "out"),
            "options": THREE,
            "iters": 0,
            "device": "cpu",
            "batch_size": 4,
            **({} if "target_size" in options else {"target_bits": 3.5}),
        }
        return open_session(RunConfig.from_options(**{**given, **options}))

    return make
