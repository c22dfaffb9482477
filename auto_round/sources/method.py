"""What the quantization_config of a model says of how its weights are to be read; the rest is told by its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from auto_round.errors import UnsupportedError
from auto_round.inference.config import CheckpointConfig, read_config

# quant_method -> checkpoints that have it.
FLOAT8 = {"fp8": "blocks as of DeepSeek, rows or tensors", "fbgemm_fp8": "rows"}
GPTQ_LIKE = {"gptq": "GPTQ", "awq": "AWQ gemm", "auto-round": "auto-round", "intel/auto-round": "auto-round"}
MXFP4, COMPRESSED = "mxfp4", "compressed-tensors"
READ = (*FLOAT8, MXFP4, COMPRESSED, *GPTQ_LIKE)
COMPRESSED_FORMATS = {
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
}
USUAL_BLOCK = (128, 128)


@dataclasses.dataclass(frozen=True, slots=True)
class SourceMethod:
    """How weights of a quantized model are stored, as far as their tensors do not tell it.

    Attributes:
        name: its quant_method.
        block: rows and columns that share a scale where scales are a matrix.
        layers: what GPTQ, AWQ and auto-round checkpoints say of each layer; None for others.
    """

    name: str
    block: tuple[int, int] = USUAL_BLOCK
    layers: CheckpointConfig | None = None


def read_method(config: Mapping[str, Any]) -> SourceMethod:
    """Returns how the weights of a model are stored.

    Args:
        config: its quantization_config.
    Raises:
        UnsupportedError: a method or a variant that is not read.
    """
    name = str(config.get("quant_method", ""))
    if name not in READ:
        raise UnsupportedError(
            f"the model is quantized with {name or 'an unnamed method'}, which is not read. Give the original 16-bit "
            f"model, or one quantized with {', '.join(READ)}"
        )
    if name in GPTQ_LIKE:
        return SourceMethod(name, layers=read_config(config))
    if name == COMPRESSED:
        _check_compressed(config)
        return SourceMethod(name, _compressed_block(config))
    block = config.get("weight_block_size")
    return SourceMethod(name, USUAL_BLOCK if block is None else (int(block[0]), int(block[1])))


def _check_compressed(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for what compressed-tensors does besides quantization: sparsity and rotation."""
    groups = list((config.get("config_groups") or {}).values())
    formats = {str(group["format"]) for group in groups if group.get("format")} | {str(config.get("format", "dense"))}
    problems = [f"format '{name}'" for name in sorted(formats - COMPRESSED_FORMATS)]
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        problems.append(f"sparse weights ({sparsity})")
    if (config.get("transform_config") or {}).get("config_groups"):
        problems.append("rotated weights (transform_config)")
    if problems:
        raise UnsupportedError(
            f"the model is a compressed-tensors checkpoint with {', '.join(problems)}, which is not read. Give the "
            f"original 16-bit model, or one with the formats {', '.join(sorted(COMPRESSED_FORMATS))}"
        )


def _compressed_block(config: Mapping[str, Any]) -> tuple[int, int]:
    for group in (config.get("config_groups") or {}).values():
        block = ((group if isinstance(group, Mapping) else {}).get("weights") or {}).get("block_structure")
        if block:
            rows, columns = block.split("x") if isinstance(block, str) else block
            return int(rows), int(columns)
    return USUAL_BLOCK
