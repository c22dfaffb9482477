"""Writes a GGUF file, one tensor at a time, so that a model never has to fit into memory.

Quantized weights come from the store, all else from the source. Weights that the plan could not quantize because the
file has them rearranged or stacked are rounded here, with searched scales.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.config import MODEL_DTYPES, RunConfig
from auto_round.data_types import DATA_TYPES
from auto_round.formats.export import HEAD_BLOCK
from auto_round.formats.gguf.contents import Contents, FileTensor, Part, contents_of, gguf_package, types_of
from auto_round.formats.gguf.importance import importance_of_tensors
from auto_round.formats.gguf.metadata import add_value, file_stem, metadata_of, model_name
from auto_round.formats.gguf.mixes import FLOAT_TYPES, block_size
from auto_round.formats.gguf.prescribe import read_vocabulary, scheme_of
from auto_round.layouts import LAYOUTS
from auto_round.layouts.gguf_blocks import float_bytes
from auto_round.memory import release_freed
from auto_round.option_values import parse_size
from auto_round.plan import Plan
from auto_round.store import RunStore
from auto_round.tensors import QuantizedTensor

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 1 << 13  # of weights that are rounded here: embeddings have hundreds of thousands
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def write_gguf(
    folder: Path, mix: str, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig, tokenizer: Any
) -> list[Path]:
    """Writes the file, or several where `max_shard_size` was given; returns their paths.

    Files of an earlier export under the same name are removed first.
    """
    gguf = gguf_package()
    contents = contents_of(source, plan.structure)
    types = types_of(contents, mix, plan, MODEL_DTYPES.get(config.model_dtype or ""))
    name = model_name(source)
    path = folder / f"{file_stem(contents, mix, name)}.gguf"
    for stale in [path, *folder.glob(f"{path.stem}-*-of-*.gguf")]:
        stale.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(path, contents.family.arch, split_max_size=shard_bytes(config))
    vocabulary = read_vocabulary(source, tokenizer, contents)
    for key, value in metadata_of(contents, mix, name, vocabulary).items():
        add_value(writer, key, value)
    for tensor in contents.tensors:
        kind = types[tensor.name]
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(tensor.name, tensor.shape, None, byte_count(tensor.shape, kind), number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    blocks, importance = StoredWeights(plan, store), importance_of_tensors(config.calib.imatrix)
    for tensor in contents.tensors:
        data = tensor_bytes(tensor, types[tensor.name], source, blocks, importance(tensor))
        writer.write_tensor_data(data.numpy())
        release_freed()
    writer.close()
    return sorted(folder.glob(f"{path.stem}*.gguf"))


def shard_bytes(config: RunConfig) -> int:
    """Returns the largest size of a file, 0 for one file of any size.

    The default is meant for checkpoints; users of llama.cpp expect one file unless they ask for several.
    """
    default = next(field.default for field in dataclasses.fields(RunConfig) if field.name == "max_shard_size")
    return 0 if config.max_shard_size == default else parse_size(config.max_shard_size)


def byte_count(shape: tuple[int, ...], kind: str) -> int:
    """Returns the bytes of a tensor of some type."""
    values = torch.Size(shape).numel()
    if kind in FLOAT_TYPES:
        return values * FLOAT_BYTES[kind]
    layout = LAYOUTS[f"gguf_{kind.lower()}"]
    return values // block_size(kind) * layout.block_bytes  # type: ignore[attr-defined]


class StoredWeights:
    """Quantized weights by parameter name, one block of the store in memory at a time."""

    def __init__(self, plan: Plan, store: RunStore) -> None:
        self.store = store
        self.blocks = {name: group[0] for group in plan.groups for name in plan.in_group(group)}
        self.blocks |= dict.fromkeys(plan.outside(), HEAD_BLOCK)
        self.groups = [(tuple(f"{name}." for name in group), group[0]) for group in plan.groups]
        self._loaded: tuple[str, Mapping[str, QuantizedTensor], Mapping[str, Tensor]] = ("", {}, {})

    def weight(self, parameter: str | None) -> QuantizedTensor | None:
        """Returns a quantized weight, or None for one that stays."""
        block = self.blocks.get(parameter or "")
        return None if block is None else self._load(block)[1][parameter or ""]

    def tuned(self, parameter: str | None) -> Tensor | None:
        """Returns the tuned value of a norm or bias, or None where it stays."""
        for starts, block in self.groups:
            if parameter is not None and parameter.startswith(starts) and self.store.has(block):
                return self._load(block)[2].get(parameter)
        return None

    def original(self, part: Part, source: WeightSource) -> Tensor:
        """Returns what goes into the file for a part that the plan does not quantize, tuned or as in the source."""
        values = self.tuned(part.parameter)
        values = source.read(part.key) if values is None else values
        for change in (part.place.order, part.place.change):
            values = values if change is None else change(values)
        return values.detach()

    def _load(self, block: str) -> tuple[str, Mapping[str, QuantizedTensor], Mapping[str, Tensor]]:
        if self._loaded[0] != block:
            result = self.store.load(block)
            self._loaded = (block, result.weights, result.plain)
        return self._loaded


def tensor_bytes(
    tensor: FileTensor,
    kind: str,
    source: WeightSource,
    stored: StoredWeights,
    importance_RI: Tensor | None = None,
) -> Tensor:
    """Returns the bytes of one tensor of the file, flat uint8.

    Args:
        importance_RI: mean squares of the input channels, one row or one for each slice of the tensor.
    """
    if tensor.constant is not None:
        return float_bytes(tensor.constant, kind).reshape(-1)
    pieces = []
    for part in tensor.parts:
        weight = stored.weight(part.parameter)
        if weight is None:
            pieces.append(_encoded(stored.original(part, source), kind, importance_RI))
            continue
        packed = LAYOUTS[f"gguf_{kind.lower()}"].pack(weight)["blocks"]
        order = part.place.order
        pieces.append((packed if order is None else order(packed)).reshape(-1))
    return torch.cat(pieces)


def _encoded(values: Tensor, kind: str, importance_RI: Tensor | None) -> Tensor:
    """Returns the bytes of values, rounded to nearest, for block types with scales searched for the least error."""
    if kind in FLOAT_TYPES:
        return float_bytes(values, kind).reshape(-1)
    if importance_RI is not None and values.ndim == 3 and len(importance_RI) == len(values):
        return torch.cat([_rounded(one, kind, row) for one, row in zip(values, importance_RI, strict=True)])
    one_row = importance_RI is not None and len(importance_RI) == 1
    return _rounded(values.reshape(-1, values.shape[-1]), kind, importance_RI[0] if one_row else None)


def _rounded(rows: Tensor, kind: str, importance_I: Tensor | None) -> Tensor:
    layout, scheme = LAYOUTS[f"gguf_{kind.lower()}"], scheme_of(kind)
    data_type = DATA_TYPES[scheme.data_type]
    packed = []
    for piece in rows.split(ROWS_AT_A_TIME):
        weight_OI = piece.float()
        range_ = data_type.search_range(weight_OI, scheme, importance_I)
        weight = data_type.encode(weight_OI, scheme, range_, data_type.trainable(weight_OI, scheme))
        packed.append(layout.pack(weight)["blocks"].reshape(-1))
    return torch.cat(packed)


def contents_and_types(
    mix: str, plan: Plan, source: WeightSource, config: RunConfig
) -> tuple[Contents, dict[str, str]]:
    """Returns what a file has to hold: its tensors and the type of each."""
    contents = contents_of(source, plan.structure)
    return contents, types_of(contents, mix, plan, MODEL_DTYPES.get(config.model_dtype or ""))
