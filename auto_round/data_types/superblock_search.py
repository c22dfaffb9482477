"""The two-level grid of super-blocks, and its numbers of least weighted squared error.

Groups are fitted by themselves first (`group_fit`). Units of a super-block that represent the fitted scales well are
tried, then codes and units are improved in turn: each group takes the best of the neighbouring codes of its scale and
minimum, judged by the true error of rounding to them; then the units are refitted to all levels of the super-block.
llama.cpp rounds scales once and stops there.

Weights are multiplied by a power of two for each super-block, so that squares of any float32 number stay finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from auto_round.data_types.base import Range, cast_ste, row_pieces
from auto_round.data_types.group_fit import (
    TINY,
    ErrorWeights,
    dot,
    error_weights,
    fit_affine,
    fit_signed,
    levels_for,
)
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import to_groups

# Units tried for fitted scales: as if the outermost code were so many codes further out.
UNIT_SHIFTS = {4: (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0), 6: (-1.0, -0.5, 0.0, 0.5, 1.0), 8: (0.0,)}
IMPROVE_ROUNDS = 3
NEAR_STEPS, FAR_STEPS = (-1, 0, 1), (-2, -1, 0, 1, 2)  # codes tried around the best, for single channels and products
LARGEST_EXPONENT = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The integers of a scheme with double quantization.

    Attributes:
        bounds: lowest and highest level: 0 and 2**bits - 1, or signed.
        code_bounds: lowest and highest code of scales and minima.
        span: groups of a super-block.
        dtype: of the units, the numbers of a super-block.
    """

    bounds: tuple[int, int]
    code_bounds: tuple[int, int]
    span: int
    dtype: str

    @property
    def outermost(self) -> int:
        """The code of largest magnitude."""
        return self.code_bounds[0] or self.code_bounds[1]

    def expand(self, per_super_OS1: Tensor, groups: int) -> Tensor:
        """Returns (O, G, 1): the number of its super-block for each group."""
        return per_super_OS1.repeat_interleave(self.span, dim=1)[:, :groups]

    def blocks(self, per_group_OG1: Tensor) -> Tensor:
        """Returns (O, S, span) numbers of groups by super-block; a cut one is filled up with zeros."""
        padded = torch.nn.functional.pad(per_group_OG1.squeeze(-1), (0, -per_group_OG1.shape[1] % self.span))
        return padded.reshape(padded.shape[0], -1, self.span)

    def total(self, per_group_OG1: Tensor) -> Tensor:
        """Returns (O, S, 1) sums over the groups of super-blocks."""
        return self.blocks(per_group_OG1).sum(-1, keepdim=True)

    def codes_for(self, wanted_OG1: Tensor, unit_OS1: Tensor) -> Tensor:
        """Returns (O, G, 1) nearest codes of wanted numbers in units of their super-block; 0 where the unit is 0."""
        unit = self.expand(unit_OS1, wanted_OG1.shape[1])
        known = unit.abs() > 0
        codes = (wanted_OG1 / torch.where(known, unit, torch.ones_like(unit))).round().clamp(*self.code_bounds)
        return torch.where(known, codes, torch.zeros_like(codes))

    def extreme(self, wanted_OG1: Tensor) -> Tensor:
        """Returns (O, S, 1) the number of largest magnitude of each super-block, with its sign."""
        blocks = self.blocks(wanted_OG1)
        return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))

    def covering_unit(self, wanted_OG1: Tensor) -> Tensor:
        """Returns (O, S, 1) units, as stored, that give the number of largest magnitude the outermost code."""
        return cast_ste(self.extreme(wanted_OG1) / self.outermost, self.dtype)


def grid_of(scheme: QuantizationScheme) -> Grid:
    """Returns the grid of a scheme."""
    assert scheme.super_bits is not None
    assert scheme.super_group_size is not None
    span, dtype = scheme.super_group_size, scheme.scale_dtype
    if scheme.sym:
        half, super_half = 2 ** (scheme.bits - 1), 2 ** (scheme.super_bits - 1)
        return Grid((-half, half - 1), (-super_half, super_half - 1), span, dtype)
    return Grid((0, 2**scheme.bits - 1), (0, 2**scheme.super_bits - 1), span, dtype)


def default_weights(x: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Returns (O, G, K) weights of the error where no importance is known, those of llama.cpp's quantizers.

    |x| for Q2_K, rms of the group plus |x| for Q4_K and Q5_K, x squared for Q3_K and Q6_K.
    """
    if scheme.sym:
        return x.square()
    if scheme.bits == 2:
        return x.abs()
    return x.square().mean(-1, keepdim=True).sqrt() + x.abs()


def search_superblocks(weight_OI: Tensor, scheme: QuantizationScheme, importance: Tensor | None) -> Range:
    """Returns {"scale_codes" (O, G, 1), "super_scale" (O, S, 1)}, when asymmetric "minimum_codes" and "super_offset".

    Args:
        importance: (I,) mean squares or (G, K, K) mean products of input channels; None: `default_weights`.
    """
    grid = grid_of(scheme)
    grouped = to_groups(weight_OI.float(), scheme.group_size)
    given = None if importance is None else error_weights(importance, weight_OI, scheme.group_size)
    found = []
    for rows in row_pieces(grouped):
        factor = _factors(grid, grouped[rows])
        x = grouped[rows] / grid.expand(factor, grouped.shape[1])
        weights = ErrorWeights(default_weights(x, scheme)) if given is None else given.of_rows(rows)
        found.append(_Search(x, weights, grid, scheme, factor).run())
    return {name: torch.cat([piece[name] for piece in found]) for name in found[0]}


def _factors(grid: Grid, grouped: Tensor) -> Tensor:
    """Returns (O, S, 1) powers of two just above the largest magnitude of each super-block."""
    peak = grid.extreme(grouped.abs().amax(-1, keepdim=True))
    exponent = torch.frexp(peak).exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(peak), exponent)


class _Search:
    """The search over some rows; its state is the best range found so far, in units of `factor`."""

    def __init__(
        self, x: Tensor, weights: ErrorWeights, grid: Grid, scheme: QuantizationScheme, factor: Tensor
    ) -> None:
        self.x, self.weights, self.grid, self.factor = x, weights, grid, factor
        self.bits, self.groups = scheme.bits, x.shape[1]
        self.shifts = UNIT_SHIFTS.get(scheme.super_bits or 0, UNIT_SHIFTS[6])

    def run(self) -> dict[str, Tensor]:
        """Returns the best range, units as stored."""
        given = self.weights
        self.weights = given.diagonal()
        best = self._improved(self._first(*self._fit()), NEAR_STEPS)
        if given.products is not None:
            # Products have more local minima: starting where single channels are best is never worse than these.
            self.weights = given
            best = self._improved(dataclasses.replace(best, error=self._error(best)), FAR_STEPS)
        names = ("scale_codes", "super_scale", "minimum_codes", "super_offset")
        units = [best.unit * self.factor, None if best.minimum_unit is None else best.minimum_unit * self.factor]
        found = dict(zip(names, (best.codes, units[0], best.minimum_codes, units[1]), strict=True))
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _fit(self) -> tuple[Tensor, Tensor | None]:
        """Returns the scales and minima of groups by themselves."""
        if self.grid.bounds[0] == 0:
            return fit_affine(self.x, self.weights, self.bits, minimum_floor=0.0)
        low, high = self.x.amin(-1, keepdim=True), self.x.amax(-1, keepdim=True)
        covering = torch.where(high < -low, low, high) / self.grid.bounds[0]
        return fit_signed(self.x, self.weights, self.bits, covering), None

    def _improved(self, best: _Point, steps: tuple[int, ...]) -> _Point:
        """Returns the point after rounds over neighbouring codes and refitted units; never a worse one."""
        for _ in range(IMPROVE_ROUNDS):
            best = self._refit_units(self._neighbours(best, steps))
        return self._neighbours(best, steps)

    def _stored(self, unit: Tensor) -> Tensor:
        return cast_ste(unit * self.factor, self.grid.dtype) / self.factor

    def _first(self, scale: Tensor, minimum: Tensor | None) -> _Point:
        """Returns the best of the rounded fits over the tried units of scales, then of minima."""
        extreme = self.grid.extreme(scale)
        if minimum is None:
            units = [
                self._stored(extreme / (sign * (self.grid.outermost + shift)))
                for shift in self.shifts
                for sign in (1, -1)
            ]
            return self._best_point([self._point(self.grid.codes_for(scale, unit), unit) for unit in units])
        scales = [self._rounded(scale, extreme, shift) for shift in self.shifts]
        lowest = self.grid.extreme(minimum)
        minima = [self._rounded(minimum, lowest, shift) for shift in self.shifts]
        error_at = self._errors_at_levels(levels_for(self.x, scale, minimum, self.grid.bounds))
        pairs = [(one, other) for one in range(len(scales)) for other in range(len(minima))]
        errors = [self.grid.total(error_at(scales[i].number, minima[j].number)) for i, j in pairs]
        chosen = torch.stack(errors).argmin(0)
        codes, unit = _pick(scales, chosen // len(minima), self.grid)
        minimum_codes, minimum_unit = _pick(minima, chosen % len(minima), self.grid)
        return self._point(codes, unit, minimum_codes, minimum_unit)

    def _rounded(self, wanted: Tensor, extreme: Tensor, shift: float) -> _Rounded:
        unit = self._stored(extreme / (self.grid.outermost + shift))
        codes = self.grid.codes_for(wanted, unit)
        return _Rounded(codes, unit, self.grid.expand(unit, self.groups) * codes)

    def _errors_at_levels(self, levels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function from scales and minima (O, G, 1) to their errors at fixed levels, up to a constant.

        It needs sums over groups only, a tenth of the time of rounding anew, and ranks roundings of the scale alike.
        """
        pulled, ones = self.weights.pull(levels), self.weights.squares.expand_as(levels)
        power, cross, mixed = dot(pulled, levels), dot(pulled, self.x), dot(ones, levels)
        total, sum_x = ones.sum(-1, keepdim=True), dot(ones, self.x)
        return lambda s, m: s * (s * power - 2 * cross) + m * (m * total + 2 * sum_x - 2 * s * mixed)

    def _best_point(self, points: list[_Point]) -> _Point:
        best = points[0]
        for point in points[1:]:
            best = self._better(best, point)
        return best

    def _point(
        self, codes: Tensor, unit: Tensor, minimum_codes: Tensor | None = None, minimum_unit: Tensor | None = None
    ) -> _Point:
        point = _Point(codes, unit, minimum_codes, minimum_unit, codes)
        return dataclasses.replace(point, error=self._error(point))

    def _grid_of_point(self, point: _Point) -> tuple[Tensor, Tensor | None]:
        scale = self.grid.expand(point.unit, self.groups) * point.codes
        if point.minimum_codes is None or point.minimum_unit is None:
            return scale, None
        return scale, self.grid.expand(point.minimum_unit, self.groups) * point.minimum_codes

    def _error(self, point: _Point) -> Tensor:
        """Returns (O, G, 1) true errors of rounding to a point's scales and minima."""
        scale, minimum = self._grid_of_point(point)
        levels = levels_for(self.x, scale, minimum, self.grid.bounds)
        fake = levels.mul_(scale) if minimum is None else levels.mul_(scale).sub_(minimum)
        return self.weights.error(fake.sub_(self.x))

    def _better(self, first: _Point, second: _Point) -> _Point:
        """Returns the better of two points for each super-block."""
        wins = self.grid.total(second.error) < self.grid.total(first.error)
        return _choose(wins, self.grid.expand(wins, self.groups), second, first)

    def _neighbours(self, best: _Point, steps: tuple[int, ...]) -> _Point:
        """Returns the point with the best of the neighbouring codes for each group."""
        start = best
        for step in steps:
            for other in steps if start.minimum_codes is not None else (0,):
                if step == 0 and other == 0:
                    continue
                codes = (start.codes + step).clamp(*self.grid.code_bounds)
                minimum_codes = start.minimum_codes
                if minimum_codes is not None:
                    minimum_codes = (minimum_codes + other).clamp(*self.grid.code_bounds)
                point = self._point(codes, start.unit, minimum_codes, start.minimum_unit)
                best = _choose(None, point.error < best.error, point, best)
        return best

    def _refit_units(self, best: _Point) -> _Point:
        """Returns the point with units refitted to the levels of all groups, where that is better."""
        scale, minimum = self._grid_of_point(best)
        levels = levels_for(self.x, scale, minimum, self.grid.bounds) * best.codes
        pulled = self.weights.pull(levels)
        power, cross = self.grid.total(dot(pulled, levels)), self.grid.total(dot(pulled, self.x))
        if best.minimum_codes is None:
            unit = self._stored(torch.where(power > 0, cross / power.clamp(min=TINY), best.unit))
            return self._better(best, self._point(best.codes, unit))
        minima = best.minimum_codes.expand_as(levels)
        pulled_minima = self.weights.pull(minima)
        mixed = self.grid.total(dot(pulled, minima))
        own, pull_x = self.grid.total(dot(pulled_minima, minima)), self.grid.total(dot(pulled_minima, self.x))
        determinant = power * own - mixed * mixed
        usable = determinant > 1e-7 * power * own
        divisor = torch.where(usable, determinant, torch.ones_like(determinant))
        unit = torch.where(usable, (own * cross - mixed * pull_x) / divisor, best.unit)
        minimum_unit = torch.where(usable, (mixed * cross - power * pull_x) / divisor, best.minimum_unit)
        unit, minimum_unit = self._stored(unit.clamp(min=0)), self._stored(minimum_unit.clamp(min=0))
        return self._better(best, self._point(best.codes, unit, best.minimum_codes, minimum_unit))


@dataclasses.dataclass(frozen=True, slots=True)
class _Rounded:
    """Codes (O, G, 1) in a unit (O, S, 1) as it is stored, and the numbers (O, G, 1) that they are."""

    codes: Tensor
    unit: Tensor
    number: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Point:
    """Codes (O, G, 1) and units (O, S, 1), as stored, and the error (O, G, 1) that they leave."""

    codes: Tensor
    unit: Tensor
    minimum_codes: Tensor | None
    minimum_unit: Tensor | None
    error: Tensor


def _pick(tried: Sequence[_Rounded], chosen_OS1: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Returns codes (O, G, 1) and units (O, S, 1) of the roundings with the chosen numbers."""
    unit = torch.stack([one.unit for one in tried]).gather(0, chosen_OS1[None])[0]
    codes = torch.stack([one.codes for one in tried])
    return codes.gather(0, grid.expand(chosen_OS1, codes.shape[2])[None])[0], unit


def _choose(wins_OS1: Tensor | None, wins_OG1: Tensor, first: _Point, second: _Point) -> _Point:
    """Returns the first point's codes where it wins, else the second's; units too if they are asked for."""

    def pick(wins: Tensor | None, one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if wins is None or one is None or other is None:
            return other
        return torch.where(wins, one, other)

    codes, error = torch.where(wins_OG1, first.codes, second.codes), torch.where(wins_OG1, first.error, second.error)
    unit = second.unit if wins_OS1 is None else torch.where(wins_OS1, first.unit, second.unit)
    minimum_codes = pick(wins_OG1, first.minimum_codes, second.minimum_codes)
    minimum_unit = pick(wins_OS1, first.minimum_unit, second.minimum_unit)
    return _Point(codes, unit, minimum_codes, minimum_unit, error)
