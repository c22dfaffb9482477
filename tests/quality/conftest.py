"""A finished run on a tiny model, and its original and quantized model as plain Transformers models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import pipeline
from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS, FormatTarget
from auto_round.session import Session, open_session
from auto_round.store import RunStore

FAST = {"iters": 3, "batch_size": 4, "group_size": 32, "nsamples": 8, "seqlen": 16, "device": "cpu", "bits": 3}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that is quantized and not written."""

    model: Any
    session: Session
    store: RunStore

    def quantized(self) -> Any:
        """Returns the quantized model as Transformers loads it, its weights dequantized."""
        folder = self.store.folder.parent / "dequantized"
        pipeline.write(self.session, FormatTarget(EXPORTERS["fake"], folder), self.store)
        return type(self.model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def finish(make_model: Callable[..., Any], token_ids: Callable[..., torch.Tensor], tmp_path: Path) -> Callable:
    """Returns finish(kind, **options) -> Finished; eight of 20 rows of tokens calibrate, 12 are held out."""

    def run(kind: str = "llama", model: Any = None, tokenizer: Any = None, **options: Any) -> Finished:
        model = make_model(kind) if model is None else model
        dataset = options.pop("dataset", list(token_ids(20, 16)))
        config = RunConfig.from_options(
            model=model, output_dir=str(tmp_path), **{**FAST, "dataset": dataset, **options}
        )
        session = open_session(config, tokenizer=tokenizer)
        return Finished(model, session, pipeline.quantize(session, tmp_path / "work"))

    return run


@pytest.fixture
def padded(token_ids: Callable[..., torch.Tensor]) -> CalibrationSet:
    """Samples of two lengths, with samples of two lengths held out."""
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[3:, 11:] = False
    held_out = CalibrationSet(token_ids(6, 16, seed=5), mask)
    return CalibrationSet(token_ids(8, 16), held_out=held_out)
