"""Reopens a GGUF file that was just written, with the `gguf` package's reader and decoders, and compares.

Every tensor of the source must have come into the file, none may be there that nobody asked for, and a sample is
decoded and compared value by value with what was quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.config import RunConfig
from auto_round.formats.gguf.contents import Contents, FileTensor, Part, gguf_package
from auto_round.formats.gguf.metadata import file_stem, model_name
from auto_round.formats.gguf.mixes import FLOAT_TYPES
from auto_round.formats.gguf.writer import StoredWeights, contents_and_types
from auto_round.formats.written import listed
from auto_round.plan import Plan
from auto_round.store import RunStore

PER_TYPE = 4
SMALL = 1 << 18  # values; tensors up to this size that are not quantized are all compared
# Largest error of a weight that is rounded while it is written, over the largest weight of its tensor. The coarsest
# type has four levels, so half a step is a sixth of the range; a tensor that went to the wrong place is off by more.
ROUNDED = 0.6


def check_gguf(
    folder: Path, mix: str, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig
) -> tuple[list[str], str]:
    """Returns what is wrong with a written file, and a line on what was looked at."""
    contents, types = contents_and_types(mix, plan, source, config)
    stem = file_stem(contents, mix, model_name(source))
    files = sorted(path for path in folder.glob(f"{stem}*.gguf"))
    try:
        readers = [gguf_package().GGUFReader(file) for file in files]
    except (ValueError, OSError, IndexError) as error:
        return [f"{folder}: a file cannot be read: {error}"], ""
    found = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    problems = _account(contents, types, found, len(readers), readers)
    intact = [tensor for tensor in contents.tensors if tensor.name in found and not problems]
    chosen = _sampled(intact, types)
    stored = StoredWeights(plan, store)
    problems += listed(
        "tensors that do not read back as they were quantized or stored",
        [tensor.name for tensor in chosen if not _same(tensor, found[tensor.name], source, stored)],
    )
    quantized = sum(types[tensor.name] not in FLOAT_TYPES for tensor in contents.tensors)
    dropped = [f"{key} ({why})" for key, why in contents.dropped.items()]
    keys = sum(len({part.key for part in tensor.parts}) for tensor in contents.tensors)
    line = (
        f"all tensors accounted for ({keys} stored tensors in {len(found)}: {quantized} quantized, "
        f"{len(found) - quantized} float; {(listed(f'dropped {len(dropped)}', dropped) or ['dropped 0'])[0]}), "
        f"{len(chosen)} decoded and compared"
    )
    return problems, line


def _account(
    contents: Contents, types: dict[str, str], found: dict[str, Any], files: int, readers: Sequence[Any]
) -> list[str]:
    """Returns what is missing, what nobody asked for, and what has another shape or type."""
    if not files:
        return ["there is no file"]
    wanted = {tensor.name: tensor for tensor in contents.tensors}
    problems = listed("tensors that are missing", wanted.keys() - found.keys())
    problems += listed("tensors that nobody asked for", found.keys() - wanted.keys())
    wrong = []
    for name in wanted.keys() & found.keys():
        is_shape = tuple(int(n) for n in reversed(found[name].shape)) == wanted[name].shape
        if not is_shape or found[name].tensor_type.name != types[name]:
            wrong.append(f"{name} is {found[name].tensor_type.name}, not {types[name]} {list(wanted[name].shape)}")
    problems += listed("tensors of another shape or type", wrong)
    arch = readers[0].fields.get("general.architecture")
    if arch is None or arch.contents() != contents.family.arch:
        problems.append(f"general.architecture is not {contents.family.arch}")
    tokens = readers[0].fields.get("tokenizer.ggml.tokens")
    rows = next(tensor.shape[0] for tensor in contents.tensors if tensor.name == "token_embd.weight")
    if tokens is None or len(tokens.data) != rows:
        problems.append(f"the vocabulary has not the {rows} tokens of the embedding")
    return problems


def _sampled(tensors: list[FileTensor], types: dict[str, str]) -> list[FileTensor]:
    """Returns a few tensors of each type, and all small ones that are not quantized."""
    chosen: dict[str, FileTensor] = {}
    for kind in dict.fromkeys(types.values()):
        own = [tensor for tensor in tensors if types[tensor.name] == kind]
        step = max(1, (len(own) - 1) // (PER_TYPE - 1)) if own else 1
        chosen |= {tensor.name: tensor for tensor in [*own[::step], *own[-1:]]}
    small = (t for t in tensors if types[t.name] in FLOAT_TYPES and torch.Size(t.shape).numel() <= SMALL)
    return list((chosen | {tensor.name: tensor for tensor in small}).values())


def _same(tensor: FileTensor, found: Any, source: WeightSource, stored: StoredWeights) -> bool:
    """Whether a tensor of the file decodes to what it stands for."""
    package = gguf_package()
    values = package.dequantize(found.data, found.tensor_type)
    decoded = torch.from_numpy(values.copy()).reshape(tensor.shape)
    if not bool(decoded.isfinite().all()):
        return False
    if tensor.constant is not None:
        return torch.equal(tensor.constant, decoded)
    slices = decoded if tensor.parts[0].place.expert is not None else decoded[None]
    return all(
        _same_part(*pair, found.tensor_type.name, source, stored) for pair in zip(tensor.parts, slices, strict=True)
    )


def _same_part(part: Part, decoded: Tensor, kind: str, source: WeightSource, stored: StoredWeights) -> bool:
    weight = stored.weight(part.parameter)
    if weight is not None:
        dense, order = weight.dequantize(), part.place.order
        return torch.equal(dense if order is None else order(dense), decoded)
    wanted = stored.original(part, source).float().reshape(decoded.shape)
    if kind in FLOAT_TYPES:
        return torch.equal(wanted.to(_dtype(kind)).float(), decoded)
    return bool((wanted - decoded).abs().max() <= ROUNDED * wanted.abs().max())


def _dtype(kind: str) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
