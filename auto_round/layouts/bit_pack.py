"""Dense bit packing into int32 words, one routine for 2 to 8 bits and both directions.

Codes are laid end to end, lowest bits first, along the last dimension. Widths that do not divide 32 cross word borders;
for 3 bits this gives the three-word pattern of the GPTQ layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def codes_per_unit(bits: int) -> int:
    """Returns the smallest number of codes that fills whole 32-bit words."""
    return 32 // math.gcd(32, bits)


def packed_words(count: int, bits: int) -> int:
    """Returns the number of int32 words for `count` codes, padded to whole units."""
    unit = codes_per_unit(bits)
    return -(-count // unit) * unit * bits // 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs unsigned codes along the last dimension.

    Args:
        codes: (..., n) uint8, values in [0, 2**bits). A count that does not fill whole units is padded with zeros.
        bits: 1 to 8.
    Returns:
        (..., packed_words(n, bits)) int32.
    Source: AutoGPTQ's qweight for 2, 3, 4 and 8 bits; byte-level golden checkpoints in the tests.
    """
    unit = codes_per_unit(bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % unit))
    units = codes.reshape(*codes.shape[:-1], -1, unit)
    words = torch.zeros(*units.shape[:-1], unit * bits // 32, dtype=torch.int64, device=codes.device)
    for index in range(unit):
        word, shift = divmod(index * bits, 32)
        value = units[..., index].long()
        words[..., word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= value >> (32 - shift)
    return _as_int32(words).reshape(*codes.shape[:-1], -1)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns (..., count) uint8 codes, the inverse of `pack_bits`.

    Args:
        words: (..., w) int32.
        bits: 1 to 8.
        count: number of codes along the last dimension before padding.
    """
    unit = codes_per_unit(bits)
    units = words.reshape(*words.shape[:-1], -1, unit * bits // 32)
    codes = torch.empty(*units.shape[:-1], unit, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for index in range(unit):
        word, shift = divmod(index * bits, 32)
        value = units[..., word] >> shift
        if shift + bits > 32:
            value = (value & ((1 << (32 - shift)) - 1)) | (units[..., word + 1] << (32 - shift))
        codes[..., index] = (value & mask).to(torch.uint8)
    return codes.reshape(*words.shape[:-1], -1)[..., :count]


def _as_int32(words: Tensor) -> Tensor:
    """Returns the low 32 bits of int64 words as int32, the sign bit included."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
