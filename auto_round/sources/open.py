"""Opens the model of a run: a folder in 16 bits, a folder that is quantized already, or a model in memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.checkpoint import (
    CheckpointSource,
    ModuleSource,
    WeightSource,
    model_config,
    quantization_of,
    structure_of,
)
from auto_round.errors import ConfigError
from auto_round.sources.dequantized import DequantizedTensors
from auto_round.sources.method import read_method
from auto_round.stored_tensors import StoredTensors

logger = logging.getLogger(__name__)


def open_source(model: Path | nn.Module, *, trust_remote_code: bool = False) -> WeightSource:
    """Returns where the weights of a model come from. Weights that are quantized already are given in 16 bits.

    Args:
        model: a folder, or a model in memory.
    Raises:
        ConfigError: no model folder, code in it that was not allowed to run, or a model that was loaded quantized.
        UnsupportedError: a folder that is quantized in a way that is not read.
        CheckpointError: no or unreadable weights.
    """
    if isinstance(model, nn.Module):
        _check_plain(model)
        return ModuleSource(model)
    config = model_config(model, trust_remote_code=trust_remote_code)
    quantization = quantization_of(config)
    if quantization is None:
        return CheckpointSource(model, trust_remote_code=trust_remote_code)
    method = read_method(quantization)
    structure = structure_of(model, trust_remote_code=trust_remote_code)
    dtype = dense_dtype(config)
    tensors = DequantizedTensors(StoredTensors(model), method, dtype, _transposed(structure))
    logger.info(
        "%s is quantized (%s): %d weights are dequantized to %s as they are read",
        model, method.name, len(tensors.packed), str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return CheckpointSource.of(model, tensors, structure, unwanted=tensors.is_leftover)


def dense_dtype(config: dict[str, Any]) -> torch.dtype:
    """Returns the dtype that a config.json says the model computes in, bfloat16 if it does not."""
    for part in (config, config.get("text_config") or {}):
        name = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        if name in ("bfloat16", "float16", "float32"):
            return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.bfloat16


def _transposed(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def _check_plain(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    raise ConfigError(
        f"the model in memory is quantized already ({getattr(method, 'value', method)}). Give its folder or hub name "
        "instead, whose weights are dequantized as they are read, or load it in 16 bits"
    )
