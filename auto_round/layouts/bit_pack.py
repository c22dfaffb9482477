"""Dense bit packing into int32 words, one routine for 2 to 8 bits and both directions.

Codes are laid end to end, lowest bits first, along the last dimension. Widths that do not divide 32 cross word borders;
for 3 bits this gives the three-word pattern of the GPTQ layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Intermediates of so many codes stay in a CPU's cache.
CODES_AT_A_TIME = 1 << 18


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
    count = codes.shape[-1]
    padding = -count % codes_per_unit(bits)
    padded = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
    flat = padded.contiguous().view(-1)
    packed = flat.new_empty(flat.numel() * bits // 8)
    join = _joined_in_pairs if bits in (1, 2, 4, 8) else _joined_in_eights
    step = CODES_AT_A_TIME if flat.device.type == "cpu" else max(flat.numel(), 8)
    for piece, own in zip(torch.split(flat, step), torch.split(packed, step * bits // 8), strict=True):
        own.copy_(join(piece, bits))
    return packed.view(torch.int32).view(*codes.shape[:-1], packed_words(count, bits))


def _joined_in_pairs(codes: Tensor, bits: int) -> Tensor:
    """Returns (n * bits / 8,) bytes, for widths that divide 8: neighbouring codes share a byte, as often as fits.

    Seen as one 16-bit number, the second of two bytes is moved down beside the first. A tenth of the time that words
    take which are put together code by code.
    """
    while bits < 8:
        pairs = codes.view(torch.int16)
        codes = (pairs | (pairs >> (8 - bits))).to(torch.uint8)
        bits *= 2
    return codes


def _joined_in_eights(codes: Tensor, bits: int) -> Tensor:
    """Returns (n * bits / 8,) bytes: eight codes, seen as one 64-bit number, become `bits` bytes.

    In three steps the upper one of two neighbouring fields is moved down beside the lower one.
    """
    eights = codes.view(torch.int64)
    for field in (8, 16, 32):
        held = bits * field // 8  # bits of a field that are in use
        lower = sum(((1 << held) - 1) << start for start in range(0, 64, 2 * field))
        upper = lower << held
        moved = (eights >> (field - held)).bitwise_and_(_signed(upper))
        eights = (eights & _signed(lower)).bitwise_or_(moved)
    return eights.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def _signed(word: int) -> int:
    """Returns the int64 with the bits of an unsigned 64-bit number."""
    return word - (1 << 64) if word >= 1 << 63 else word


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
