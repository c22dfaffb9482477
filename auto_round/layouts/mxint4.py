"""auto-round's layout of MXINT4 weights: two codes in a byte, each a sign bit above three bits of magnitude.

Source: a checkpoint of auto-round 0.16.1 with scheme MXINT4, which has packing_format "auto_round". Codes elsewhere are
two's complement, which `QuantizedTensor` holds in the low four bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import LAYOUTS
from auto_round.layouts.bit_pack import pack_bits, unpack_bits
from auto_round.layouts.float_scaled import from_exponents, to_exponents
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True, slots=True)
class MxInt4Layout:
    """weight_packed uint8 (O, I/2), the even input in the low half; weight_scale uint8 (O, I/32), exponent + 127."""

    name: str = "mxint4"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        if (scheme.data_type, scheme.bits) != ("mx_int", 4):
            return f"data_type={scheme.data_type} bits={scheme.bits} (only mx_int with 4)"
        return f"groups of 32 in {shape[1]} inputs (only whole groups)" if shape[1] % 32 else None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:  # noqa: ARG002
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        return {"weight_packed": ((rows, width // 2), "uint8"), "weight_scale": ((rows, width // 32), "uint8")}

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the codes and the exponents of the scales."""
        return {
            "weight_packed": pack_bits(swap_sign_form(weight.codes), 4).view(torch.uint8),
            "weight_scale": to_exponents(weight.scale),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        words = tensors["weight_packed"].contiguous().view(torch.int32)
        codes = swap_sign_form(unpack_bits(words, 4, shape[1]))
        scale = from_exponents(tensors["weight_scale"])
        return QuantizedTensor(codes, scale, None, scheme)


def swap_sign_form(codes: Tensor) -> Tensor:
    """Returns 4-bit two's complement numbers as sign and magnitude, or the other way round; 8 (-8, -0) becomes 0."""
    return torch.where(codes > 8, 24 - codes, codes & 7)


LAYOUTS.register("mxint4")(MxInt4Layout())
