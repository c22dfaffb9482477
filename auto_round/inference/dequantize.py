"""Weights of the layouts that keep rows of the weight as rows of a tensor (all but GPTQ's and AWQ's), dequantized.

Shape letters: O out features, I in features, G groups, K group size, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_round.elements import power_of_two
from auto_round.inference.bit_unpack import unpack_rows
from auto_round.inference.layer import QuantizedLinear
from auto_round.inference.levels import fp8_levels, pair_levels
from auto_round.inference.packing import DENSE
from auto_round.layouts.bit_pack import packed_words
from auto_round.layouts.float_scaled import E8M0_BIAS
from auto_round.layouts.fp8_flat import scale_name
from auto_round.tensors import expand_groups

ROW_LAYOUTS = frozenset({"fp8", "fp8_flat", "mxfp8", "mxfp4", "nvfp4", "mxint4", "ct_int8", "ct_packed", DENSE})
# Weights dequantized at once: on a CPU so that float32 intermediates (2 MB) stay in the second-level cache, elsewhere
# so that they stay small beside the model.
CPU_CHUNK, OTHER_CHUNK = 512 * 1024, 2**24


class RowKernel(nn.Module):
    """Computes a layer by dequantizing its weight on every call. It keeps nothing."""

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, dequantized(layer, x.dtype), bias)


def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """Returns (O, I) weights, levels times scale, computed in float32, rounded once to `dtype`."""
    if layer.spec.layout == DENSE:
        return layer.weight.to(dtype)
    weight_OI = torch.empty(layer.spec.shape, dtype=dtype, device=layer.device)
    size = layer.spec.group_size
    for rows in _chunks(layer):
        levels_RI, scale_RG = _levels(layer, rows), _scales(layer, rows)
        if layer.in_features % size:
            weight_OI[rows] = levels_RI.mul_(expand_groups(scale_RG, size, layer.in_features))
        else:
            weight_OI[rows] = levels_RI.unflatten(1, (-1, size)).mul_(scale_RG[..., None]).flatten(1)
    return weight_OI


def _chunks(layer: QuantizedLinear) -> Iterator[slice]:
    chunk = CPU_CHUNK if layer.device.type == "cpu" else OTHER_CHUNK
    step = max(chunk // layer.in_features, 1)
    return (slice(start, start + step) for start in range(0, layer.out_features, step))


def _levels(layer: QuantizedLinear, rows: slice) -> Tensor:
    """Returns (R, I) float32, a new tensor: what the codes stand for, in units of the scale."""
    layout = layer.spec.layout
    if layout == "ct_packed":
        return _packed_levels(layer, rows)
    if layout == "ct_int8":
        return layer.weight[rows].float()
    if layout in ("fp8", "fp8_flat", "mxfp8"):
        return fp8_levels(layer.weight[rows])
    return pair_levels(layer.weight_packed[rows], layout)


def _packed_levels(layer: QuantizedLinear, rows: slice) -> Tensor:
    bits, width = layer.spec.scheme.bits, layer.in_features
    words_RW = layer.weight_packed[rows]
    # Unlike GPTQ's, the last unit of a row may be cut off.
    words_RW = F.pad(words_RW, (0, packed_words(width, bits) - words_RW.shape[1]))
    codes_RI = unpack_rows(words_RW, bits)[:, :width].float()
    if layer.spec.scheme.sym:
        return codes_RI.sub_(2 ** (bits - 1))
    zeros_GW = F.pad(layer.weight_zero_point.t(), (0, packed_words(layer.out_features, bits) - _zero_words(layer)))
    zero_RG = unpack_rows(zeros_GW, bits)[:, : layer.out_features].t()[rows].float()
    return codes_RI.sub_(expand_groups(zero_RG, layer.spec.group_size, width))


def _zero_words(layer: QuantizedLinear) -> int:
    return layer.weight_zero_point.shape[0]


def _scales(layer: QuantizedLinear, rows: slice) -> Tensor:
    """Returns (R, G) float32, or (1, 1) where one scale serves all rows."""
    layout, scheme = layer.spec.layout, layer.spec.scheme
    if layout in ("mxfp4", "mxfp8", "mxint4"):
        return power_of_two(layer.weight_scale[rows].to(torch.int32) - E8M0_BIAS)
    if layout == "nvfp4":
        return fp8_levels(layer.weight_scale[rows]).div_(layer.weight_global_scale)
    if layout in ("ct_int8", "ct_packed"):
        return layer.weight_scale[rows].float()
    scale = getattr(layer, scale_name(scheme) if layout == "fp8_flat" else "weight_scale").float()
    if isinstance(scheme.group_size, tuple):
        block = torch.arange(rows.start, min(rows.stop, layer.out_features), device=scale.device)
        return scale[block // scheme.group_size[0]]
    return scale.view(-1, 1) if scheme.group_size == 0 else scale.view(-1, 1)[rows]
