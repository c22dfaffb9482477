"""Super-blocks of GGUF files (k-quants): 256 weights in groups whose scales and minima are codes themselves.

In Q2_K, Q4_K and Q5_K a group's scale is d * code and its minimum -dmin * code; in Q3_K and Q6_K codes of scales are
signed and there is no minimum. Scale codes are not kept in a `QuantizedTensor`: they are scale / super scale, exactly.

Letters: N super-blocks of the whole matrix, G groups of one. Source: block_q2_K to block_q6_K in ggml-common.h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import LAYOUTS
from auto_round.layouts.gguf_blocks import BlockType, from_half_bytes, half_bytes, join_bits, split_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

SUPER_BLOCK = 256


@dataclasses.dataclass(frozen=True, slots=True)
class SuperBlock(BlockType):
    """Packing shared by all five: numbers in, sections of bytes out, in the order of `sections`.

    Attributes:
        sections: (name, bytes) in file order: "d", "dmin", "scales", "low" and "high" bits of codes.
    """

    sections: tuple[tuple[str, int], ...]

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the blocks."""
        assert weight.super_scale is not None
        codes_NI = weight.codes.reshape(-1, SUPER_BLOCK)
        steps_NG = _steps(weight.scale, weight.super_scale)
        parts = {"d": half_bytes(weight.super_scale)}
        minima_NG = None
        if weight.offset is not None and weight.super_offset is not None:
            minima_NG = _steps(-weight.offset, weight.super_offset)
            parts["dmin"] = half_bytes(weight.super_offset)
        parts["scales"] = _PACK_SCALES[self.gguf_name](steps_NG, minima_NG)
        parts |= _pack_codes(self.gguf_name, codes_NI)
        joined = torch.cat([parts[name] for name, _ in self.sections], dim=1)
        return {"blocks": joined.reshape(weight.shape[0], -1)}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        bytes_NB = tensors["blocks"].reshape(-1, self.block_bytes)
        pieces = torch.split(bytes_NB, [size for _, size in self.sections], dim=1)
        parts = dict(zip((name for name, _ in self.sections), pieces, strict=True))
        per_super, per_group = (shape[0], shape[1] // SUPER_BLOCK), (shape[0], -1)
        steps_NG, minima_NG = _UNPACK_SCALES[self.gguf_name](parts["scales"])
        super_scale_N1 = from_half_bytes(parts["d"])[:, None]
        offset, super_offset = None, None
        if minima_NG is not None:
            super_offset_N1 = from_half_bytes(parts["dmin"])[:, None]
            offset = -(super_offset_N1 * minima_NG).reshape(per_group)
            super_offset = super_offset_N1.reshape(per_super)
        return QuantizedTensor(
            codes=_unpack_codes(self.gguf_name, parts).reshape(shape),
            scale=(super_scale_N1 * steps_NG).reshape(per_group),
            zero_point=None,
            scheme=scheme,
            offset=offset,
            super_scale=super_scale_N1.reshape(per_super),
            super_offset=super_offset,
        )


def _steps(values_OG: Tensor, super_OS: Tensor) -> Tensor:
    """Returns (N, G) int16: how many times the value of a super-block its groups have; 0 where that is 0."""
    values_NG = values_OG.reshape(super_OS.numel(), -1)
    unit_N1 = super_OS.reshape(-1, 1)
    return (values_NG / torch.where(unit_N1.abs() > 0, unit_N1, torch.ones_like(unit_N1))).round().to(torch.int16)


def _pack_codes(kind: str, codes_NI: Tensor) -> dict[str, Tensor]:
    """Returns the sections "low" and "high"; a byte holds codes that are 32 (or in Q6_K 64) weights apart."""
    if kind == "Q2_K":
        return {"low": _interleave(codes_NI, 2, 32)}
    if kind == "Q3_K":
        return {"low": _interleave(codes_NI & 3, 2, 32), "high": _interleave(codes_NI >> 2, 1, 32)}
    if kind == "Q6_K":
        return {"low": _interleave(codes_NI & 15, 4, 64), "high": _interleave(codes_NI >> 4, 2, 32)}
    low = {"low": _interleave(codes_NI & 15, 4, 32)}
    return low if kind == "Q4_K" else low | {"high": _interleave(codes_NI >> 4, 1, 32)}


def _unpack_codes(kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Returns (N, 256) uint8 codes from their sections."""
    low_bits, distance = {"Q2_K": (2, 32), "Q3_K": (2, 32), "Q6_K": (4, 64)}.get(kind, (4, 32))
    codes = _separate(parts["low"], low_bits, distance)
    if "high" in parts:
        codes = codes | _separate(parts["high"], 2 if kind == "Q6_K" else 1, 32) << low_bits
    return codes


def _interleave(fields_NI: Tensor, bits: int, distance: int) -> Tensor:
    """Returns (N, bytes): fields `distance` apart share a byte, the first one lowest."""
    return join_bits(fields_NI.reshape(len(fields_NI), -1, 8 // bits, distance).transpose(2, 3), bits).flatten(1)


def _separate(bytes_NB: Tensor, bits: int, distance: int) -> Tensor:
    """Returns (N, 256), the inverse of `_interleave`."""
    return split_bits(bytes_NB.reshape(len(bytes_NB), -1, distance), bits).transpose(2, 3).flatten(1)


def _pack_nibble_pairs(steps_NG: Tensor, minima_NG: Tensor | None) -> Tensor:
    """Q2_K: 16 bytes, scale code low, minimum code high."""
    assert minima_NG is not None
    return (steps_NG | minima_NG << 4).to(torch.uint8)


def _unpack_nibble_pairs(bytes_NB: Tensor) -> tuple[Tensor, Tensor]:
    return (bytes_NB & 15).float(), (bytes_NB >> 4).float()


def _pack_signed_six_bits(steps_NG: Tensor, _minima: Tensor | None) -> Tensor:
    """Q3_K: 16 codes plus 32; 8 bytes of low halves, group g with g + 8, then 4 bytes of the upper two bits."""
    codes = (steps_NG + 32).to(torch.uint8)
    low = join_bits((codes & 15).reshape(-1, 2, 8).transpose(1, 2), 4)
    return torch.cat([low, join_bits((codes >> 4).reshape(-1, 4, 4).transpose(1, 2), 2)], dim=1)


def _unpack_signed_six_bits(bytes_NB: Tensor) -> tuple[Tensor, None]:
    low = split_bits(bytes_NB[:, :8], 4).transpose(1, 2).flatten(1)
    high = split_bits(bytes_NB[:, 8:], 2).transpose(1, 2).flatten(1)
    return (low | high << 4).float() - 32, None


def _pack_six_bit_pairs(steps_NG: Tensor, minima_NG: Tensor | None) -> Tensor:
    """Q4_K, Q5_K: 4 scale and 4 minimum codes whole; the other 4 of each: low halves last, upper bits above these."""
    assert minima_NG is not None
    steps, minima = steps_NG.to(torch.uint8), minima_NG.to(torch.uint8)
    first = [codes[:, :4] | (codes[:, 4:] >> 4) << 6 for codes in (steps, minima)]
    return torch.cat([*first, (steps[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], dim=1)


def _unpack_six_bit_pairs(bytes_NB: Tensor) -> tuple[Tensor, Tensor]:
    steps, minima, low = bytes_NB[:, :4], bytes_NB[:, 4:8], bytes_NB[:, 8:]
    steps_NG = torch.cat([steps & 63, (low & 15) | (steps >> 6) << 4], dim=1)
    minima_NG = torch.cat([minima & 63, (low >> 4) | (minima >> 6) << 4], dim=1)
    return steps_NG.float(), minima_NG.float()


def _pack_signed_bytes(steps_NG: Tensor, _minima: Tensor | None) -> Tensor:
    return steps_NG.to(torch.int8).contiguous().view(torch.uint8)


def _unpack_signed_bytes(bytes_NB: Tensor) -> tuple[Tensor, None]:
    return bytes_NB.contiguous().view(torch.int8).float(), None


_PACK_SCALES = {
    "Q2_K": _pack_nibble_pairs,
    "Q3_K": _pack_signed_six_bits,
    "Q4_K": _pack_six_bit_pairs,
    "Q5_K": _pack_six_bit_pairs,
    "Q6_K": _pack_signed_bytes,
}
_UNPACK_SCALES = {
    "Q2_K": _unpack_nibble_pairs,
    "Q3_K": _unpack_signed_six_bits,
    "Q4_K": _unpack_six_bit_pairs,
    "Q5_K": _unpack_six_bit_pairs,
    "Q6_K": _unpack_signed_bytes,
}
_SECTIONS = {
    "Q2_K": (("scales", 16), ("low", 64), ("d", 2), ("dmin", 2)),
    "Q3_K": (("high", 32), ("low", 64), ("scales", 12), ("d", 2)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("low", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("high", 32), ("low", 128)),
    "Q6_K": (("low", 128), ("high", 64), ("scales", 16), ("d", 2)),
}
for _kind, _found in _SECTIONS.items():
    _layout = SuperBlock(f"gguf_{_kind.lower()}", SUPER_BLOCK, sum(size for _, size in _found), _found)
    LAYOUTS.register(_layout.name)(_layout)
