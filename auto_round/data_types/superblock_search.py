"""The two-level grid of super-blocks, and its codes of least weighted squared error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.data_types.base import Range, cast_ste
from auto_round.schemes import QuantizationScheme


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The integers of a scheme with double quantization.

    Attributes:
        lowest, highest: bounds of levels: 0 and 2**bits - 1, or signed.
        code_bounds: bounds of the codes of scales and minima.
        span: groups of a super-block.
    """

    lowest: int
    highest: int
    code_bounds: tuple[int, int]
    span: int

    def expand(self, per_super_OS1: Tensor, groups: int) -> Tensor:
        """Returns (O, G, 1): the number of its super-block for each group."""
        return per_super_OS1.repeat_interleave(self.span, dim=1)[:, :groups]

    def blocks(self, per_group_OGx: Tensor) -> Tensor:
        """Returns (O, S, span, x) numbers of groups by super-block; a cut one is filled up with zeros."""
        padding = -per_group_OGx.shape[1] % self.span
        padded = torch.nn.functional.pad(per_group_OGx, (0, 0, 0, padding)) if padding else per_group_OGx
        return padded.unflatten(1, (-1, self.span))

    def codes_for(self, wanted_OG1: Tensor, unit_OS1: Tensor) -> Tensor:
        """Returns (O, G, 1) nearest codes of wanted numbers in units of their super-block; 0 where the unit is 0."""
        unit = self.expand(unit_OS1, wanted_OG1.shape[1])
        codes = (wanted_OG1 / torch.where(unit.abs() > 0, unit, torch.ones_like(unit))).round().clamp(*self.code_bounds)
        return torch.where(unit.abs() > 0, codes, torch.zeros_like(codes))

    def covering_unit(self, wanted_OG1: Tensor, scheme: QuantizationScheme) -> Tensor:
        """Returns (O, S, 1) units, as stored, that give the number of largest magnitude the outermost code."""
        blocks = self.blocks(wanted_OG1)[..., 0]
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        outermost = self.code_bounds[0] if self.code_bounds[0] < 0 else self.code_bounds[1]
        return cast_ste(extreme / outermost, scheme.scale_dtype)


def grid_of(scheme: QuantizationScheme) -> Grid:
    """Returns the grid of a scheme."""
    assert scheme.super_bits is not None
    assert scheme.super_group_size is not None
    if scheme.sym:
        half, super_half = 2 ** (scheme.bits - 1), 2 ** (scheme.super_bits - 1)
        return Grid(-half, half - 1, (-super_half, super_half - 1), scheme.super_group_size)
    return Grid(0, 2**scheme.bits - 1, (0, 2**scheme.super_bits - 1), scheme.super_group_size)


def search_superblocks(weight_OI: Tensor, scheme: QuantizationScheme, importance: Tensor | None, start: Range) -> Range:
    """Returns the start: the search is a commit of its own."""
    return start
