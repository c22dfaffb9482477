"""Fast unpacking of int32 words into uint8 codes and back, the run-time counterpart of `layouts/`.

Works on bytes instead of words: a quarter of the memory traffic of int32 shifts (4096 x 4096 codes of 4 bits on one
core: 6 ms against 70 ms, and 13 ms against 73 ms to pack them). Equal to `layouts.bit_pack`, which defines the
meaning; little-endian hosts only, as all that PyTorch supports.

Shape letters: R rows, W words of a row, B bytes of a unit, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.layouts.bit_pack import pack_bits

# Bits of an AWQ word at which column 0..7 of its eight starts. Source: AutoAWQ's gemm packing.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def unpack_rows(words_RW: Tensor, bits: int) -> Tensor:
    """Returns (R, W * 32 / bits) uint8 codes that lie end to end, lowest bits first, along each row.

    Args:
        words_RW: int32, whole units of 32 / gcd(32, bits) codes.
        bits: 1 to 8.
    """
    bytes_ = _bytes(words_RW)
    if bits == 8:
        return bytes_
    mask = 2**bits - 1
    if 8 % bits == 0:
        parts = [(bytes_ >> shift) & mask for shift in range(0, 8 - bits, bits)]
        return torch.stack([*parts, bytes_ >> (8 - bits)], dim=-1).flatten(1)
    # Eight codes fill `bits` bytes; code k starts at bit k * bits and may reach into the next byte.
    units = bytes_.reshape(bytes_.shape[0], -1, bits)
    parts = []
    for start in range(0, 8 * bits, bits):
        byte, shift = divmod(start, 8)
        part = units[..., byte] >> shift
        if shift + bits > 8:
            part = part | (units[..., byte + 1] << (8 - shift))
        parts.append(part & mask)
    return torch.stack(parts, dim=-1).flatten(1)


def unpack_awq_columns(words_WR: Tensor) -> Tensor:
    """Returns (W * 8, R) uint8 codes of AWQ words given transposed: each word holds eight rows of the result."""
    bytes_ = _bytes(words_WR).unflatten(-1, (-1, 4))
    parts = [(bytes_[..., shift // 8] >> (shift % 8)) & 15 for shift in AWQ_SHIFTS]
    return torch.stack(parts, dim=1).flatten(0, 1)


def pack_rows(codes_RI: Tensor, bits: int) -> Tensor:
    """Returns (R, words) int32, the inverse of `unpack_rows`; a row that fills no whole word is padded with zeros."""
    if 8 % bits:
        return pack_bits(codes_RI, bits)
    padded = torch.nn.functional.pad(codes_RI, (0, -codes_RI.shape[1] % (32 // bits)))
    parts = padded.unflatten(1, (-1, 8 // bits)).unbind(-1)
    bytes_ = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        bytes_ |= part << (index * bits)
    return _words(bytes_)


def pack_awq_columns(codes_OR: Tensor) -> Tensor:
    """Returns (W, R) int32, the inverse of `unpack_awq_columns`; O is padded with zeros to a multiple of 8."""
    padded = torch.nn.functional.pad(codes_OR, (0, 0, 0, -codes_OR.shape[0] % 8))
    columns = padded.unflatten(0, (-1, 8)).unbind(1)
    bytes_ = [columns[AWQ_SHIFTS.index(shift)] | columns[AWQ_SHIFTS.index(shift + 4)] << 4 for shift in range(0, 32, 8)]
    return _words(torch.stack(bytes_, dim=-1).flatten(1))


def _bytes(words_RW: Tensor) -> Tensor:
    """Returns (R, W * 4) uint8. By way of one dimension: a single column counts as contiguous whatever its stride."""
    return words_RW.contiguous().view(-1).view(torch.uint8).view(words_RW.shape[0], -1)


def _words(bytes_RB: Tensor) -> Tensor:
    return bytes_RB.contiguous().view(-1).view(torch.int32).view(bytes_RB.shape[0], -1)
