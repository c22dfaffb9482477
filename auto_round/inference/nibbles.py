"""A weight of at most 4 bits laid out for products of 8-bit integers on a CPU: two codes in a byte, output features
side by side.

Half a byte holds a code as a signed number of 4 bits (code - 2**(bits - 1)). The tiles of a weight, each some output
features wide, lie one after the other in memory, and within a tile its groups. The matrices of some groups are made by
two operations over whole bytes: 16 times a byte modulo 256, and its upper half, are both FACTOR times a signed code.

Shape letters: O out features, I in features, G groups, K group size, H = K / 2, T features of a tile, N groups at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from auto_round.inference.int8_product import tile_features

# What codes are multiplied with in `NibbleTile.matrices`.
FACTOR = 16
# 0xF0 in each byte of a signed 64-bit word.
UPPER_HALVES = -0x0F0F0F0F0F0F0F10


@dataclasses.dataclass(frozen=True, slots=True)
class NibbleTile:
    """Some output features of a weight.

    Attributes:
        features: which ones; their number is a multiple of 8.
        nibbles_GHT: uint8, feature h of a group in the lower half of a byte, feature K/2 + h in the upper one.
    """

    features: slice
    nibbles_GHT: Tensor

    def matrices(self, count: int) -> Iterator[Sequence[Tensor]]:
        """Yields (K, T) int8 matrices of `count` groups after another, FACTOR times their signed codes."""
        groups, half, width = self.nibbles_GHT.shape
        matrices_NKT = torch.empty((min(count, groups), 2 * half, width), dtype=torch.int8)
        lower, upper = matrices_NKT[:, :half].view(torch.uint8), matrices_NKT[:, half:].view(torch.int64)
        matrices = matrices_NKT.unbind()
        for nibbles_NHT in self.nibbles_GHT.split(count):
            present = len(nibbles_NHT)
            if present < len(matrices):
                lower, upper, matrices = lower[:present], upper[:present], matrices[:present]
            # For 128 KB: the product takes 3 us, a shift of bytes 12; AND on 8 bytes at a time 6 us, on single ones 16.
            torch.mul(nibbles_NHT, FACTOR, out=lower)
            torch.bitwise_and(nibbles_NHT.view(torch.int64), UPPER_HALVES, out=upper)
            yield matrices

    def codes(self, bits: int) -> Tensor:
        """Returns (T, I) uint8 codes, what `pack_nibbles` was given."""
        signed_IT = torch.cat([matrix_KT >> 4 for (matrix_KT,) in self.matrices(1)])
        return (signed_IT + 2 ** (bits - 1)).to(torch.uint8).t().contiguous()

    def dequantize(self, scale_GT: Tensor, zero_GT: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns (I, T) weights, computed in float32 and rounded once.

        Args:
            scale_GT: float32 scales divided by FACTOR.
            zero_GT: signed zero points times FACTOR, of any integer dtype; None: all are 0.
            dtype: of the result.
        """
        groups, half, width = self.nibbles_GHT.shape
        weight_GKT = torch.empty((groups, 2 * half, width), dtype=dtype)
        for group, (matrix_KT,) in enumerate(self.matrices(1)):
            codes_KT = matrix_KT.float()
            if zero_GT is not None:
                codes_KT -= zero_GT[group]
            weight_GKT[group] = codes_KT.mul_(scale_GT[group])
        return weight_GKT.flatten(0, 1)


def pack_nibbles(codes_OI: Tensor, bits: int, group_size: int, widths: tuple[int, ...]) -> Tensor:
    """Returns (O * I / 2,) uint8.

    Args:
        codes_OI: uint8 in [0, 2**bits), bits at most 4.
        bits: of a code.
        group_size: even, divides I.
        widths: output features of each tile, O in total.
    """
    packed = []
    for rows_TI in codes_OI.split(list(widths)):
        signed = (rows_TI - 2 ** (bits - 1)) & 15
        lower, upper = signed.t().reshape(-1, 2, group_size // 2, rows_TI.shape[0]).unbind(1)
        packed.append((lower | upper << 4).flatten())
    return torch.cat(packed)


def tiles_of(nibbles: Tensor, in_features: int, group_size: int, widths: tuple[int, ...]) -> list[NibbleTile]:
    """Returns views of what `pack_nibbles` gave."""
    parts = nibbles.split([width * in_features // 2 for width in widths])
    return [
        NibbleTile(features, part.view(-1, group_size // 2, width))
        for features, part, width in zip(tile_features(widths), parts, widths, strict=True)
    ]
