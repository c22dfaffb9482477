"""Integer layouts of compressed-tensors: codes packed along the input ("pack-quantized"), or plain int8 weights.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`; golden checkpoints in
the tests. Its integers are signed; the stored words hold them plus 2**(bits-1), which are the codes here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import (
    LAYOUTS,
    input_scale_specs,
    pack_input_scale,
    unpack_input_peak,
    why_not_integer_groups,
)
from auto_round.layouts.bit_pack import pack_bits, packed_words, unpack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedPackedLayout:
    """weight_packed int32 (O, I*bits/32), weight_scale (O, G), weight_shape int64 (2,); when asymmetric
    weight_zero_point int32 (O*bits/32, G), packed along the output."""

    name: str = "ct_packed"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        return why_not_integer_groups(scheme) or _why_not_whole_groups(scheme, shape)

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        groups = group_count(width, scheme.group_size)
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_packed": ((rows, _words(width, scheme.bits)), "int32"),
            "weight_scale": ((rows, groups), scheme.scale_dtype),
            "weight_shape": ((2,), "int64"),
        }
        if not scheme.sym:
            found["weight_zero_point"] = ((_words(rows, scheme.bits), groups), "int32")
        return found

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns weight_packed, weight_scale, weight_shape and, when asymmetric, weight_zero_point."""
        scheme = weight.scheme
        tensors = {
            "weight_packed": _pack(weight.codes, scheme.bits),
            "weight_scale": weight.scale.to(getattr(torch, scheme.scale_dtype)).contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = _pack(weight.zero_point.t().contiguous(), scheme.bits).t().contiguous()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        rows, width = shape
        codes = _unpack(tensors["weight_packed"], scheme.bits, width)
        zero = None
        if not scheme.sym:
            zero = _unpack(tensors["weight_zero_point"].t().contiguous(), scheme.bits, rows).t().contiguous()
        return QuantizedTensor(codes, tensors["weight_scale"].float().contiguous(), zero, scheme)


@dataclasses.dataclass(frozen=True, slots=True)
class Int8Layout:
    """weight int8 (O, I) = code - 128, weight_scale (O, G); input_scale () where activation ranges are calibrated."""

    name: str = "ct_int8"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        if scheme.bits != 8 or not scheme.sym:
            return f"bits={scheme.bits} sym={scheme.sym} (only 8 bits, symmetric)"
        return why_not_integer_groups(scheme) or _why_not_whole_groups(scheme, shape)

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        groups = group_count(shape[1], scheme.group_size)
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "weight": (shape, "int8"),
            "weight_scale": ((shape[0], groups), scheme.scale_dtype),
        }
        return found | input_scale_specs(scheme)

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns weight, weight_scale and, where it is known, input_scale = peak / 127."""
        dtype = getattr(torch, weight.scheme.scale_dtype)
        tensors = {
            "weight": (weight.codes.to(torch.int16) - 128).to(torch.int8),
            "weight_scale": weight.scale.to(dtype).contiguous(),
        }
        return tensors | pack_input_scale(weight)

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        scheme: QuantizationScheme,
        shape: tuple[int, int],  # noqa: ARG002
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
        peak = unpack_input_peak(tensors, scheme)
        return QuantizedTensor(codes, tensors["weight_scale"].float().contiguous(), None, scheme, input_peak=peak)


def _why_not_whole_groups(scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
    size = scheme.group_size
    if isinstance(size, int) and size > 0 and shape[1] % size:
        return f"groups of {size} in {shape[1]} inputs (only whole groups)"
    return None


def _words(count: int, bits: int) -> int:
    """Returns the int32 words that `count` codes take, end to end."""
    return -(-count * bits // 32)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes packed along the last dimension; the last word may be part full, unlike GPTQ's whole units."""
    return pack_bits(codes, bits)[..., : _words(codes.shape[-1], bits)].contiguous()


def _unpack(words: Tensor, bits: int, count: int) -> Tensor:
    missing = packed_words(count, bits) - words.shape[-1]
    return unpack_bits(torch.nn.functional.pad(words, (0, missing)), bits, count).contiguous()


LAYOUTS.register("ct_packed")(CompressedPackedLayout())
LAYOUTS.register("ct_int8")(Int8Layout())
