"""What can be tuned of a weight whose codes are fixed: factors of its stored scales, as logarithms.

A scale is tuned as scale * exp(sigma), so it keeps its sign and a step means the same for large and small ones. Each
data type says which numbers sigma holds, what weight they give, rounded to what is stored, and their gradient. With G
the gradient by the dequantized weight W_hat, dL/d sigma is the sum of G * W_hat over the weights under a scale: W_hat
is proportional to it, and rounding of the scale passes gradients unchanged (straight-through).
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

    def gradient(self, product_OI: Tensor, weight: QuantizedTensor) -> Tensor:
        """Returns the gradient by sigma from G * W_hat, (O, I) float32."""
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

    def gradient(self, product_OI: Tensor, weight: QuantizedTensor) -> Tensor:
        """Returns sums over the weights under each scale."""
        sums_OG = to_groups(product_OI, weight.scheme.group_size).sum(-1)
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

    def gradient(self, product_OI: Tensor, weight: QuantizedTensor) -> Tensor:  # noqa: ARG002
        """Returns the sum over the tensor."""
        return product_OI.sum()


SCALE_FACTORS.register("int", "fp", "fp_e5m2")(GroupScales())
SCALE_FACTORS.register("nv_fp")(TensorScale())
