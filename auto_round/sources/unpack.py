"""The stored tensors of one quantized weight -> codes and scales. Widths and groups are told by their shapes.

What a config says of single layers is needed only where tensors leave it open, so that a layer never depends on the
name that it has in a config. Sources: the layouts used here; Transformers' `finegrained_fp8` for block scales, `mxfp4`
for blocks.

Shape letters: E experts, O out features, I in features, G groups of a row, W words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.layouts import LAYOUTS
from auto_round.layouts.bit_pack import packed_words
from auto_round.schemes import QuantizationScheme
from auto_round.sources.method import SourceMethod
from auto_round.tensors import QuantizedTensor, effective_group_size, group_count

Tensors = Mapping[str, Tensor]
FLOAT8 = {torch.float8_e4m3fn: "fp", torch.float8_e5m2: "fp_e5m2"}
MXFP4, MXFP8 = (QuantizationScheme.from_dict({"data_type": "mx_fp", "bits": bits}) for bits in (4, 8))
MXINT4 = QuantizationScheme.from_dict({"data_type": "mx_int", "bits": 4})
NVFP4 = QuantizationScheme.from_dict({"data_type": "nv_fp"})


def dense_shape(tensors: Tensors, method: SourceMethod, key: str) -> tuple[int, ...]:
    """Returns the shape of a weight, from its parts on any device, the meta device included."""
    if "qweight" in tensors:
        rows = tensors["scales"].shape[1]
        return rows, _integer_width(tensors, _integer_scheme(tensors, method, key), _is_awq(method))
    if "weight_blocks" in tensors:
        *outer, groups, half = tensors["weight_blocks"].shape
        return (*outer, 2 * half * groups)
    if "weight" in tensors:
        return tuple(tensors["weight"].shape)
    packed = tensors["weight_packed"]
    if packed.dtype == torch.uint8:
        return packed.shape[0], 2 * packed.shape[1]
    # The only shape that is a value: it is not on the meta device.
    rows, width = tensors["weight_shape"].tolist()
    return rows, width


def unpack(tensors: Tensors, method: SourceMethod, key: str) -> QuantizedTensor:
    """Returns a two-dimensional weight.

    Args:
        tensors: its parts, see `PackedWeight`.
        key: its name in the checkpoint, for the config and for errors.
    Raises:
        CheckpointError: tensors that do not fit together.
        UnsupportedError: a dtype that no layout has.
    """
    if "qweight" in tensors:
        return _unpack_integer(tensors, method, key)
    shape = dense_shape(tensors, method, key)
    if "weight_blocks" in tensors:
        flat = {
            "weight_packed": tensors["weight_blocks"].flatten(1),
            "weight_scale": tensors["weight_scales"],
        }
        return LAYOUTS["mxfp4"].unpack(flat, MXFP4, _matrix(shape, key))
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    assert scale is not None, key
    if "weight_packed" in tensors and tensors["weight_packed"].dtype == torch.int32:
        return _unpack_words(tensors, scale, _matrix(shape, key), key)
    if "weight_packed" in tensors:
        return _unpack_pairs(tensors, method, _matrix(shape, key), key)
    if tensors["weight"].dtype == torch.int8:
        return _unpack_int8(tensors, scale, key)
    if tensors["weight"].dtype not in FLOAT8:
        raise UnsupportedError(f"{key} is stored as {tensors['weight'].dtype} with scales, which is not read")
    if scale.dtype == torch.uint8:
        return LAYOUTS["mxfp8"].unpack(tensors, MXFP8, _matrix(shape, key))
    return _unpack_fp8(tensors["weight"], scale, method, key)


def _matrix(shape: tuple[int, ...], key: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise UnsupportedError(f"{key} has {len(shape)} dimensions in a form that is read for matrices only")
    return shape[0], shape[1]


def _unpack_fp8(weight_OI: Tensor, scale: Tensor, method: SourceMethod, key: str) -> QuantizedTensor:
    """Returns an FP8 weight with scales for the tensor, for each row, or for each block."""
    rows, width = weight_OI.shape
    size: int | tuple[int, int]
    if scale.numel() == 1:
        size = 0
    elif scale.shape in ((rows,), (rows, 1)):
        size = -1
    else:
        size = method.block
        blocks = (-(-rows // size[0]), -(-width // size[1]))
        if scale.shape != blocks:
            raise CheckpointError(
                f"{key} has scales {list(scale.shape)} for {rows} x {width} weights: neither rows nor blocks of "
                f"{size[0]} x {size[1]}, which would be {list(blocks)}"
            )
    fields = {"data_type": FLOAT8[weight_OI.dtype], "group_size": size, "scale_dtype": "float32"}
    scheme = QuantizationScheme.from_dict(fields)
    return LAYOUTS["fp8"].unpack({"weight": weight_OI, "weight_scale": scale}, scheme, (rows, width))


def _unpack_int8(tensors: Tensors, scale: Tensor, key: str) -> QuantizedTensor:
    """Returns int8 weights with scales for the tensor, for each row or for groups; zero points are int8 too."""
    rows, width = _matrix(tuple(tensors["weight"].shape), key)
    codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
    scale_OG = _per_row(scale, rows)
    zero = tensors.get("weight_zero_point")
    if zero is not None:
        zero = (_per_row(zero, rows).to(torch.int16) + 128).to(torch.uint8)
    return QuantizedTensor(codes, scale_OG.float(), zero, _groups_of(8, scale_OG, width, zero is None, key))


def _unpack_words(tensors: Tensors, scale: Tensor, shape: tuple[int, int], key: str) -> QuantizedTensor:
    """Returns integers that compressed-tensors packed into int32 words, end to end in a row."""
    rows, width = shape
    scale_OG, packed = _per_row(scale, rows), tensors["weight_packed"]
    bits = packed.shape[1] * 32 // width
    if not 2 <= bits <= 8 or packed.shape[0] != rows:
        raise CheckpointError(f"{key}: weight_packed {list(packed.shape)} does not hold {rows} x {width} weights")
    index, zero = tensors.get("weight_g_idx"), tensors.get("weight_zero_point")
    if zero is not None and zero.dtype != torch.int32:
        raise UnsupportedError(f"{key}: zero points of dtype {zero.dtype} are not read (only packed into int32)")
    if index is not None and not bool((index >= 0).all()):
        index = None  # filled with -1 where inputs have their own order
    if index is None:
        scheme = _groups_of(bits, scale_OG, width, zero is None, key)
        return LAYOUTS["ct_packed"].unpack({**tensors, "weight_scale": scale_OG}, scheme, shape)
    row = QuantizationScheme(bits=bits, group_size=-1)
    first = LAYOUTS["ct_packed"].unpack({**tensors, "weight_scale": scale_OG[:, :1]}, row, shape)
    if zero is None:
        return _with_index(first.codes, scale_OG.float(), None, index, bits)
    # A matrix with an input for each group has the same zero points.
    grouped = QuantizationScheme(bits=bits, group_size=1, sym=False)
    zeros = (
        LAYOUTS["ct_packed"].unpack({**tensors, "weight_scale": scale_OG}, grouped, tuple(scale_OG.shape)).zero_point
    )
    return _with_index(first.codes, scale_OG.float(), zeros, index, bits)


def _unpack_pairs(tensors: Tensors, method: SourceMethod, shape: tuple[int, int], key: str) -> QuantizedTensor:
    """Returns weights of four bits, two in a byte."""
    if "weight_global_scale" in tensors:
        return LAYOUTS["nvfp4"].unpack(tensors, NVFP4, shape)
    if tensors["weight_scale"].dtype != torch.uint8:
        raise UnsupportedError(f"{key}: scales of dtype {tensors['weight_scale'].dtype} are not read for MX weights")
    if _layer_fields(method, key).get("data_type") == "mx_int":
        return LAYOUTS["mxint4"].unpack(tensors, MXINT4, shape)
    return LAYOUTS["mxfp4"].unpack(tensors, MXFP4, shape)


def _unpack_integer(tensors: Tensors, method: SourceMethod, key: str) -> QuantizedTensor:
    """Returns a GPTQ or AWQ weight; its inputs may be in groups of any order (`desc_act`)."""
    scheme = _integer_scheme(tensors, method, key)
    assert method.layers is not None
    layout = LAYOUTS[method.layers.packing]
    rows, width = tensors["scales"].shape[1], _integer_width(tensors, scheme, _is_awq(method))
    index = tensors.get("g_idx")
    size = effective_group_size(scheme.group_size, width)
    if index is None or torch.equal(index.long(), torch.arange(width) // size):
        return layout.unpack(tensors, scheme, (rows, width))
    zeros = None
    if not scheme.sym:
        # A matrix with an input for each group has the same zero points.
        shape = (rows, tensors["scales"].shape[0])
        zeros = layout.unpack(tensors, scheme.replace(group_size=1), shape).zero_point
    row = QuantizationScheme(bits=scheme.bits, group_size=-1)
    codes = layout.unpack({**tensors, "scales": tensors["scales"][:1]}, row, (rows, width)).codes
    return _with_index(codes, tensors["scales"].t().float(), zeros, index, scheme.bits)


def _with_index(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, index_I: Tensor, bits: int
) -> QuantizedTensor:
    """Returns a weight whose inputs each name their group: it has a scale of its own for each weight."""
    index = index_I.long()
    scheme = QuantizationScheme(bits=bits, group_size=1, sym=zero_OG is None)
    return QuantizedTensor(codes_OI, scale_OG[:, index], None if zero_OG is None else zero_OG[:, index], scheme)


def _integer_scheme(tensors: Tensors, method: SourceMethod, key: str) -> QuantizationScheme:
    """Returns the scheme of a GPTQ or AWQ weight: as the config has it if the tensors agree, else as they tell it."""
    fields = _layer_fields(method, key)
    asked, size = int(fields.get("bits", 4)), fields.get("group_size", 128)
    words, groups, rows = tensors["qzeros"].shape[1], *tensors["scales"].shape
    fitting = [bits for bits in (asked, 4, 8, 3, 2, 5, 6, 7) if packed_words(rows, bits) == words]
    if not fitting:
        raise CheckpointError(f"{key}: qzeros {list(tensors['qzeros'].shape)} does not hold zero points of {rows} rows")
    scheme = QuantizationScheme(bits=fitting[0], group_size=-1, sym=bool(fields.get("sym", True)))
    width = _integer_width(tensors, scheme, _is_awq(method))
    if not isinstance(size, int) or group_count(width, size) != groups:
        size = -(-width // groups)
    if group_count(width, size) != groups:
        raise CheckpointError(f"{key}: {groups} groups do not fit {width} inputs")
    return scheme.replace(group_size=size)


def _integer_width(tensors: Tensors, scheme: QuantizationScheme, is_awq: bool) -> int:
    if "g_idx" in tensors:
        return tensors["g_idx"].shape[0]
    return tensors["qweight"].shape[0] if is_awq else tensors["qweight"].shape[0] * 32 // scheme.bits


def _is_awq(method: SourceMethod) -> bool:
    return method.layers is not None and method.layers.packing == "awq"


def _layer_fields(method: SourceMethod, key: str) -> Mapping[str, Any]:
    """Returns what the config says of a layer; what it says of all, if it does not know that this one is quantized."""
    if method.layers is None:
        return {}
    plan = method.layers.resolve(key.removesuffix(".weight"))
    return method.layers.defaults if plan is None else dataclasses.asdict(plan[0])


def _groups_of(bits: int, scale_OG: Tensor, width: int, sym: bool, key: str) -> QuantizationScheme:
    """Returns the scheme of integers whose scales are given for each row."""
    groups = scale_OG.shape[1]
    size = -1 if groups == 1 else -(-width // groups)
    if group_count(width, size) != groups:
        raise CheckpointError(f"{key}: {groups} groups do not fit {width} inputs")
    return QuantizationScheme(bits=bits, group_size=size, sym=sym)


def _per_row(values: Tensor, rows: int) -> Tensor:
    """Returns (O, G) of values that are given for the tensor, (O,) or (O, G)."""
    if values.numel() == 1:
        return values.reshape(1, 1).expand(rows, 1)
    return values.reshape(rows, -1)
