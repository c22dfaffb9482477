"""Exports of tiny models, and what their dequantized weights compute in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from auto_round import pipeline
from auto_round.config import RunConfig
from auto_round.conversion import unfuse
from auto_round.plan import Plan
from auto_round.session import open_session
from auto_round.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True)
class Exported:
    """A checkpoint, and what was put into it.

    Attributes:
        folder: of the checkpoint.
        plan: what became of each weight.
        weights: parameter name -> quantized weight.
        original: folder of the model that was quantized.
    """

    folder: Path
    plan: Plan
    weights: dict[str, QuantizedTensor]
    original: Path

    def dequantized_model(self) -> Any:
        """Returns the original model in float32 with the weights that quantization gave."""
        model = AutoModelForCausalLM.from_pretrained(self.original, dtype=torch.float32).eval()
        if any(name.startswith("lm_head") for name in self.weights):
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        transposed = {entry.layer.parameter for entry in self.plan.entries if entry.layer.transposed}
        own = unfuse(model).model  # shares its weights
        for name, weight in self.weights.items():
            dense = weight.dequantize()
            own.get_parameter(name).data.copy_(dense.t() if name in transposed else dense)
        return model


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of 96 words, which GPTQModel loads with every model."""
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, 96)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.save_pretrained(folder)


@pytest.fixture
def export_model(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Exported]:
    """Returns make(format, kind, model, **options) -> a checkpoint of a tiny bfloat16 model, rounded to nearest."""

    def make(name: str, kind: str = "llama", *, model: dict[str, Any] | None = None, **options: Any) -> Exported:
        original, folder = tmp_path / "original", tmp_path / "exported"
        made = make_model(kind, **(model or {})).to(torch.bfloat16)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            for parameter_name, parameter in made.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.data.normal_(0, 0.1)
        made.save_pretrained(original)
        save_tokenizer(original)
        defaults = {
            "iters": 0,
            "disable_opt_rtn": True,
            "group_size": 32,
            "device": "cpu",
            "verify": False,
            "work_dir": tmp_path / "w",
        }
        config = RunConfig.from_options(
            **{**defaults, "model": str(original), "output_dir": str(folder), "format": name, **options}
        )
        session = open_session(config)
        pipeline.run(session)
        store = pipeline.quantize(
            pipeline.Session(dataclasses.replace(config, resume=True), session.source, None, session.plan),
            tmp_path / "w",
        )
        weights = {key: weight for block in store.finished() for key, weight in store.load(block).weights.items()}
        return Exported(folder, session.plan, weights, original)

    return make
