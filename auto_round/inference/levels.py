"""Fast decoding of stored codes into numbers (in units of their scales), the run-time counterpart of `elements.py`.

Shape letters: R rows, I in features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from auto_round.elements import E2M1, MXINT4
from auto_round.layouts.mxint4 import swap_sign_form


def fp8_levels(weight: Tensor) -> Tensor:
    """Returns the float32 numbers of a float8 tensor, a new tensor; NaNs, which weights have not, become numbers.

    On a CPU the bits are put where float16 has them, because PyTorch converts float8 one by one: dequantizing 4096 x
    4096 on one core takes 12 ms instead of 70.
    """
    if weight.device.type != "cpu":
        return weight.float()
    signed = weight.view(torch.int8).to(torch.int16)
    if weight.dtype == torch.float8_e5m2:
        return (signed << 8).view(torch.float16).float()
    # Sign to bit 15, the others to 7..13: exponent bias 15 instead of 7. -16385 has all bits but 14.
    return ((signed << 7) & -16385).view(torch.float16).float().mul_(2.0**8)


def pair_levels(bytes_RW: Tensor, layout: str) -> Tensor:
    """Returns (R, I) float32 numbers of bytes that hold two 4-bit codes each, the even input in the low half.

    Looks up both at once, as one 64-bit word: dequantizing 4096 x 4096 on one core takes 12 ms; with shifts and masks
    it took 46.
    """
    table = _pair_table(layout, bytes_RW.device)
    words = table.index_select(0, bytes_RW.flatten().to(torch.int32))
    return words.view(torch.float32).view(bytes_RW.shape[0], -1)


@lru_cache(maxsize=32)
def _pair_table(layout: str, device: torch.device) -> Tensor:
    """Returns (256,) int64: for each byte the two float32 numbers it stands for."""
    codes = torch.arange(16, dtype=torch.uint8)
    levels = MXINT4.decode(swap_sign_form(codes)) if layout == "mxint4" else E2M1.decode(codes)
    pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=-1)
    return pairs.view(torch.int64).flatten().to(device)
