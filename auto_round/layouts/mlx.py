"""The MLX layout ("affine"): codes packed along the input dimension, weights as scale * code + bias.

MLX stores no zero points: a bias of -zero_point * scale stands for them. It is exact for symmetric weights, whose zero
point is a power of two, and rounded once to the dtype of the scales otherwise; the zero point is read back from it.
Source: https://ml-explore.github.io/mlx (mlx.core.quantize); tested against mlx.core.dequantize.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import LAYOUTS, why_not_integer_groups
from auto_round.layouts.bit_pack import pack_bits, packed_words, unpack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, effective_group_size, group_count

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# A bias in bfloat16 is off by up to zero_point / 2**8 steps: from 128 on, the zero point cannot be told from it.
MOST_BITS_OF_BFLOAT16_BIAS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class MlxLayout:
    """weight uint32 (O, I*bits/32), scales and biases (O, G) in the scheme's scale dtype."""

    name: str = "mlx"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        reason = why_not_integer_groups(scheme)
        if reason:
            return reason
        if scheme.bits not in BITS:
            return f"bits={scheme.bits} (only {', '.join(map(str, BITS))})"
        size = effective_group_size(scheme.group_size, shape[1])
        if size not in GROUP_SIZES or shape[1] % size:
            return f"group_size={size} of {shape[1]} inputs (only {', '.join(map(str, GROUP_SIZES))}, in whole groups)"
        if not scheme.sym and scheme.scale_dtype == "bfloat16" and scheme.bits > MOST_BITS_OF_BFLOAT16_BIAS:
            return f"bits={scheme.bits}, asymmetric, with scale_dtype=bfloat16 (float16 holds it)"
        return None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        per_group = ((rows, group_count(width, scheme.group_size)), scheme.scale_dtype)
        return {
            "weight": ((rows, packed_words(width, scheme.bits)), "uint32"),
            "scales": per_group,
            "biases": per_group,
        }

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns weight, scales and biases.

        Raises:
            ValueError: a bias that overflows the dtype of the scales.
        """
        dtype = getattr(torch, weight.scheme.scale_dtype)
        bias_OG = (-weight.zero_points().float() * weight.scale).to(dtype)
        if not bool(bias_OG.isfinite().all()):
            raise ValueError(f"layout mlx: zero_point * scale overflows {weight.scheme.scale_dtype}")
        return {
            "weight": pack_bits(weight.codes, weight.scheme.bits).view(torch.uint32),
            "scales": weight.scale.to(dtype).contiguous(),
            "biases": bias_OG.contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given, except that the zero point of a group with scale 0 is lost."""
        codes_OI = unpack_bits(tensors["weight"].view(torch.int32), scheme.bits, shape[1])
        scale_OG = tensors["scales"].float().contiguous()
        if scheme.sym:
            return QuantizedTensor(codes_OI, scale_OG, None, scheme)
        divisor_OG = torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)
        zero_OG = (-tensors["biases"].float() / divisor_OG).round().clamp(0, 2**scheme.bits - 1).to(torch.uint8)
        return QuantizedTensor(codes_OI, scale_OG, zero_OG, scheme)


LAYOUTS.register("mlx")(MlxLayout())
