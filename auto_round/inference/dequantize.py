"""Weights of the layouts that keep rows of the weight as rows of a tensor (all but GPTQ's and AWQ's), dequantized.

Shape letters: O out features, I in features, G groups, K group size, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_round.inference.bit_unpack import unpack_rows
from auto_round.inference.layer import QuantizedLinear
from auto_round.inference.levels import fp8_levels, pair_levels
from auto_round.inference.packing import DENSE
from auto_round.layouts.bit_pack import packed_words
from auto_round.layouts.float_scaled import from_exponents
from auto_round.layouts.fp8_flat import scale_name
from auto_round.tensors import expand_groups

ROW_LAYOUTS = frozenset({"fp8", "fp8_flat", "mxfp8", "mxfp4", "nvfp4", "mxint4", "ct_int8", "ct_packed", DENSE})
# Weights dequantized at once: on a CPU so that they and their float32 intermediates (2 MB) stay in the second-level
# cache, elsewhere so that they stay small beside the model. Measured on one core, FP8 of 4096 x 4096, one token in
# bfloat16: 14 ms with chunks of this size, 40 ms for the whole weight at once; the same numbers come out.
CPU_CHUNK, OTHER_CHUNK = 512 * 1024, 2**24


class RowKernel(nn.Module):
    """Computes a layer by dequantizing its weight on every call, some output features at a time. It keeps nothing."""

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        return linear_in_chunks(layer, x, chunks(layer), lambda rows: dequantized(layer, rows, x.dtype))


def linear_in_chunks(
    layer: QuantizedLinear, x: Tensor, pieces: Iterable[slice], weight: Callable[[slice], Tensor]
) -> Tensor:
    """Returns (..., O) in x's dtype: a linear layer, computed for some output features at a time.

    Args:
        pieces: the output features of each chunk, all of them in order.
        weight: returns the (R, I) weights of a chunk in x's dtype.
    """
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    parts = [F.linear(x, weight(rows), None if bias is None else bias[rows]) for rows in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def chunks(layer: QuantizedLinear) -> Iterator[slice]:
    """Yields the output features to be dequantized together."""
    chunk = CPU_CHUNK if layer.device.type == "cpu" else OTHER_CHUNK
    # A multiple of 32: zero points of packed integers lie end to end along the output.
    step = layer.out_features if layer.spec.layout == DENSE else max(chunk // layer.in_features // 32, 1) * 32
    return (slice(start, start + step) for start in range(0, layer.out_features, step))


def dequantized(layer: QuantizedLinear, rows: slice, dtype: torch.dtype) -> Tensor:
    """Returns (R, I) weights of some output features: levels times scale in float32, rounded once to `dtype`."""
    if layer.spec.layout == DENSE:
        return layer.weight[rows].to(dtype)
    levels_RI, scale_RG, size = _levels(layer, rows), _scales(layer, rows), layer.spec.group_size
    if layer.in_features % size:
        return levels_RI.mul_(expand_groups(scale_RG, size, layer.in_features)).to(dtype)
    return levels_RI.unflatten(1, (-1, size)).mul_(scale_RG[..., None]).flatten(1).to(dtype)


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
    codes_RI = _unpacked(layer.weight_packed[rows], bits, width).float()
    if layer.spec.scheme.sym:
        return codes_RI.sub_(2 ** (bits - 1))
    count, first = codes_RI.shape[0], rows.start * bits // 32
    words_GW = layer.weight_zero_point[first : first + packed_words(count, bits)].t()
    zero_RG = _unpacked(words_GW, bits, count).t().float()
    return codes_RI.sub_(expand_groups(zero_RG, layer.spec.group_size, width))


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns (..., count) uint8 codes; unlike GPTQ's, the last unit of a row may be cut off."""
    missing = packed_words(count, bits) - words.shape[1]
    return unpack_rows(F.pad(words, (0, missing)) if missing else words, bits)[:, :count]


def _scales(layer: QuantizedLinear, rows: slice) -> Tensor:
    """Returns (R, G) float32, or (1, 1) where one scale serves all rows."""
    layout, scheme = layer.spec.layout, layer.spec.scheme
    if layout in ("mxfp4", "mxfp8", "mxint4"):
        return from_exponents(layer.weight_scale[rows])
    if layout == "nvfp4":
        return fp8_levels(layer.weight_scale[rows]).div_(layer.weight_global_scale)
    if layout in ("ct_int8", "ct_packed"):
        return layer.weight_scale[rows].float()
    scale = getattr(layer, scale_name(scheme) if layout == "fp8_flat" else "weight_scale").float()
    if isinstance(scheme.group_size, tuple):
        block = torch.arange(rows.start, min(rows.stop, layer.out_features), device=scale.device)
        return scale[block // scheme.group_size[0]]
    return scale.view(-1, 1) if scheme.group_size == 0 else scale.view(-1, 1)[rows]
