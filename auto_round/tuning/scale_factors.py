"""What can be tuned of a weight whose codes are fixed: factors of its stored scales, as logarithms.

A scale is tuned as scale * exp(sigma), so it keeps its sign and a step means the same for large and small ones. Each
data type says which numbers sigma holds, what weight they give, rounded to what is stored, and their gradient. With G
the gradient by the dequantized weight W_hat, dL/d sigma is the sum of G * W_hat over the weights under a scale: W_hat
is proportional to it, and rounding of the scale passes gradients unchanged (straight-through). Where groups have an
offset, W_hat = levels * scale + offset, and both parts have a sigma and a sum of their own.

Shape letters as in tensors.py; S super-blocks of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from auto_round.data_types.base import MIN_SCALE, cast_ste
from auto_round.data_types.float_grid import shared_rows
from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, to_groups


class ScaleFactors(Protocol):
    """The tunable scales of a data type. Registered in SCALE_FACTORS under its name.

    Attributes:
        shared_by_joined: weights that serving engines join have one sigma, because they have one scale.
    """

    shared_by_joined: bool

    def start(self, weight: QuantizedTensor) -> Tensor:
        """Returns sigma of the weight as it is: float32 zeros."""
        ...

    def rescaled(self, weight: QuantizedTensor, sigma: Tensor) -> QuantizedTensor:
        """Returns the weight with its scales times exp(sigma), rounded to what is stored; codes are the same."""
        ...

    def gradient(self, by_OI: Tensor, dense_OI: Tensor, weight: QuantizedTensor) -> Tensor:
        """Returns the gradient by sigma from that by W_hat and W_hat itself, (O, I) float32."""
        ...


SCALE_FACTORS: Registry[ScaleFactors] = Registry("data type with tunable scales")


def why_not_tunable(scheme: QuantizationScheme) -> str | None:
    """Returns why the scales of a scheme cannot be tuned while its codes are fixed, or None."""
    if scheme.data_type in SCALE_FACTORS:
        return None
    if scheme.data_type.startswith("mx_"):
        return f"{scheme.data_type} scales are powers of two: the next one is twice as large, no small step reaches it"
    return f"{scheme.data_type} scales have no rule for it (only {', '.join(sorted(SCALE_FACTORS))})"


class GroupScales:
    """Integers and FP8: one factor for each scale there is, (O / rows that share it, G)."""

    shared_by_joined = False

    def start(self, weight: QuantizedTensor) -> Tensor:
        """Returns zeros, one for each scale."""
        rows, groups = weight.scale.shape
        return weight.scale.new_zeros(-(-rows // shared_rows(rows, weight.scheme.group_size)), groups)

    def rescaled(self, weight: QuantizedTensor, sigma: Tensor) -> QuantizedTensor:
        """Returns the weight with scales on the grid of the scheme's scale dtype, no smaller than its smallest."""
        rows, scheme = weight.shape[0], weight.scheme
        factor_OG = sigma.exp().repeat_interleave(shared_rows(rows, scheme.group_size), dim=0)[:rows]
        wanted = cast_ste(weight.scale * factor_OG, scheme.scale_dtype)
        magnitude = wanted.abs().clamp(min=MIN_SCALE[scheme.scale_dtype])
        return dataclasses.replace(weight, scale=torch.copysign(magnitude, weight.scale))

    def gradient(self, by_OI: Tensor, dense_OI: Tensor, weight: QuantizedTensor) -> Tensor:
        """Returns sums over the weights under each scale."""
        sums_OG = to_groups(by_OI * dense_OI, weight.scheme.group_size).sum(-1)
        shared = shared_rows(sums_OG.shape[0], weight.scheme.group_size)
        padded = torch.nn.functional.pad(sums_OG, (0, 0, 0, -sums_OG.shape[0] % shared))
        return padded.unflatten(0, (-1, shared)).sum(1)


class TensorScale:
    """NVFP4: one factor for the tensor's float32 scale.

    Group scales stay: they are FP8 numbers, whose neighbours are 6 to 12 % apart, and steps here are a few per mille.
    """

    shared_by_joined = True

    def start(self, weight: QuantizedTensor) -> Tensor:
        """Returns () zero."""
        return weight.scale.new_zeros(())

    def rescaled(self, weight: QuantizedTensor, sigma: Tensor) -> QuantizedTensor:
        """Returns the weight with another global scale, which stored scales are divided by."""
        assert weight.global_scale is not None
        return dataclasses.replace(weight, global_scale=weight.global_scale * (-sigma).exp())

    def gradient(self, by_OI: Tensor, dense_OI: Tensor, weight: QuantizedTensor) -> Tensor:  # noqa: ARG002
        """Returns the sum over the tensor."""
        return (by_OI * dense_OI).sum()


class ScalesAndOffsets:
    """GGUF: factors of scale and offset of each super-block, or of each group where there are none, (1 or 2, O, S).

    Integer codes of a super-block's scales and offsets stay, the float16 numbers that they count in move.
    """

    shared_by_joined = False

    def start(self, weight: QuantizedTensor) -> Tensor:
        """Returns zeros: for scales, and for offsets if there are any."""
        units = weight.scale if weight.super_scale is None else weight.super_scale
        return units.new_zeros(1 if weight.offset is None else 2, *units.shape)

    def rescaled(self, weight: QuantizedTensor, sigma: Tensor) -> QuantizedTensor:
        """Returns the weight with other scales and offsets, or other numbers that these are whole multiples of."""
        factors, dtype = sigma.exp(), weight.scheme.scale_dtype
        if weight.super_scale is None:
            assert weight.offset is not None
            scale = cast_ste(weight.scale * factors[0], dtype).clamp(min=MIN_SCALE[dtype])
            return dataclasses.replace(weight, scale=scale, offset=cast_ste(weight.offset * factors[1], dtype))
        unit = cast_ste(weight.super_scale * factors[0], dtype)
        changed = dataclasses.replace(
            weight, super_scale=unit, scale=_multiples(weight.scale, weight.super_scale, unit, weight.scheme)
        )
        if weight.offset is None or weight.super_offset is None:
            return changed
        unit = cast_ste(weight.super_offset * factors[1], dtype)
        offset = _multiples(weight.offset, weight.super_offset, unit, weight.scheme)
        return dataclasses.replace(changed, super_offset=unit, offset=offset)

    def gradient(self, by_OI: Tensor, dense_OI: Tensor, weight: QuantizedTensor) -> Tensor:
        """Returns sums over the weights under each scale, and of what the offset adds to them."""
        sums_OG = to_groups(by_OI * dense_OI, weight.scheme.group_size).sum(-1)
        if weight.offset is None:
            return _sums(sums_OG, weight.scheme)[None]
        of_offset_OG = to_groups(by_OI, weight.scheme.group_size).sum(-1) * weight.offset.to(by_OI.device)
        return torch.stack([_sums(part, weight.scheme) for part in (sums_OG - of_offset_OG, of_offset_OG)])


def _multiples(value_OG: Tensor, unit_OS: Tensor, new_unit_OS: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Returns (O, G): the same whole multiples of new units."""
    size, groups = scheme.super_group_size or 1, value_OG.shape[1]
    before, after = (unit.repeat_interleave(size, dim=1)[:, :groups] for unit in (unit_OS, new_unit_OS))
    return torch.where(before == 0, 0, value_OG / before).round() * after


def _sums(per_group_OG: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Returns (O, S): sums over the groups of each super-block."""
    size = scheme.super_group_size or 1
    return torch.nn.functional.pad(per_group_OG, (0, -per_group_OG.shape[1] % size)).unflatten(1, (-1, size)).sum(-1)


SCALE_FACTORS.register("int", "fp", "fp_e5m2")(GroupScales())
SCALE_FACTORS.register("nv_fp")(TensorScale())
SCALE_FACTORS.register("int_dq", "int_float_zp")(ScalesAndOffsets())
