"""Scale and minimum of least weighted squared error for each group by itself, before they are rounded.

For given levels q the best scale s and minimum m of W_hat = s q - m have a closed form (weighted linear regression); so
has the error it leaves. Each candidate range is rounded once and judged by that; the winner is refined by rounding
and regression in turn. llama.cpp's make_qkx2_quants varies the scale alone; here both ends of the range move.

Shapes: grouped x (O, G, K); everything per group (O, G, 1); float32.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.tensors import GroupSize, to_groups

LEAST_SHARE = 1e-6  # of the mean: a channel that calibration never used still counts a little
# Shares of the range that are cut off at each end. Measured on heavy-tailed rows: more at 2 bits gain below 0.1 %.
CUTS = {2: (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), 4: (-0.02, 0.0, 0.02, 0.04, 0.07, 0.1)}
CUTS[5] = (-0.01, 0.0, 0.01, 0.02, 0.04, 0.06)
SIGNED_RATIOS = {3: tuple(0.5 + 0.025 * step for step in range(31)), 6: tuple(0.9 + 0.01 * step for step in range(17))}
REFINE_ROUNDS = 3
TINY = 1e-30  # keeps quotients of empty sums finite


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorWeights:
    """What the squared error of a group is weighted with.

    Attributes:
        squares: (1 or O, G, K): one weight for each code.
        products: (G, K, K) mean products of channels, whose diagonal is `squares`, or None.
    """

    squares: Tensor
    products: Tensor | None = None

    def of_rows(self, rows: slice) -> ErrorWeights:
        """Returns the weights for some rows."""
        own = self.squares if self.squares.shape[0] == 1 else self.squares[rows]
        return ErrorWeights(own, self.products)

    def diagonal(self) -> ErrorWeights:
        """Returns the weights without products."""
        return ErrorWeights(self.squares)

    def pull(self, values_OGK: Tensor) -> Tensor:
        """Returns (O, G, K): values times their weights, summed over products of channels."""
        if self.products is None:
            return self.squares * values_OGK
        return torch.einsum("ogk,gkl->ogl", values_OGK, self.products)

    def error(self, residual_OGK: Tensor) -> Tensor:
        """Returns (O, G, 1) weighted squared errors."""
        return dot(self.pull(residual_OGK), residual_OGK)


def error_weights(importance: Tensor, weight_OI: Tensor, group_size: GroupSize) -> ErrorWeights:
    """Returns weights of mean one from mean squares (I,), or mean products (G, K, K), of the layer's input channels."""
    if importance.ndim == 3:
        products = importance.float()
        squares_GK = torch.diagonal(products, dim1=1, dim2=2)
        mean = squares_GK.mean().clamp(min=TINY)
        floor = torch.eye(products.shape[-1], device=products.device) * LEAST_SHARE
        return ErrorWeights((squares_GK / mean + LEAST_SHARE)[None], products / mean + floor)
    squares_I = importance.float().to(weight_OI.device)
    return ErrorWeights(to_groups((squares_I / squares_I.mean().clamp(min=TINY) + LEAST_SHARE)[None], group_size))


def dot(first_OGK: Tensor, second_OGK: Tensor) -> Tensor:
    """Returns (O, G, 1) sums of products over a group."""
    return torch.linalg.vecdot(first_OGK, second_OGK).unsqueeze(-1)


def levels_for(x: Tensor, scale: Tensor, minimum: Tensor | None, bounds: tuple[int, int]) -> Tensor:
    """Returns (O, G, K) nearest levels; a scale of zero divides as if it were one."""
    divisor = torch.where(scale.abs() > 0, scale, torch.ones_like(scale))
    shifted = x if minimum is None else x + minimum
    return (shifted / divisor).round_().clamp_(*bounds)


def fit_signed(x: Tensor, weights: ErrorWeights, bits: int, start: Tensor) -> Tensor:
    """Returns (O, G, 1) scales of either sign for levels in [-2**(bits-1), 2**(bits-1)).

    Args:
        start: the scale that covers the group.
    """
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    best, best_gain = start, torch.full_like(start, -torch.inf)

    def keep_better(tried: Tensor) -> None:
        nonlocal best, best_gain
        levels = levels_for(x, tried, None, bounds)
        pulled = weights.pull(levels)
        cross, power = dot(pulled, x), dot(pulled, levels)
        gain = cross * cross / power.clamp(min=TINY)  # what the best scale takes off the weighted sum of squares
        better = gain > best_gain
        best = torch.where(better, cross / power.clamp(min=TINY), best)
        best_gain = torch.where(better, gain, best_gain)

    for ratio in SIGNED_RATIOS.get(bits, SIGNED_RATIOS[6]):
        keep_better(start * ratio)
        keep_better(start * -ratio)
    for _ in range(REFINE_ROUNDS):
        keep_better(best)
    return best


def fit_affine(x: Tensor, weights: ErrorWeights, bits: int, *, minimum_floor: float) -> tuple[Tensor, Tensor]:
    """Returns (O, G, 1) scales and minima m of W_hat = scale * level - m for levels in [0, 2**bits).

    Args:
        minimum_floor: least m allowed: 0 where minima are stored without a sign, else -inf.
    """
    top = 2**bits - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if minimum_floor > -torch.inf:
        low, high = low.clamp(max=0), high.clamp(min=0)
    regression = _Regression(x, weights, minimum_floor)
    best = (high - low) / top, -low
    best_gain = torch.full_like(low, -torch.inf)

    def keep_better(scale: Tensor, minimum: Tensor) -> None:
        nonlocal best, best_gain
        found_scale, found_minimum, gain = regression.solve(levels_for(x, scale, minimum, (0, top)))
        better = gain > best_gain
        best = torch.where(better, found_scale, best[0]), torch.where(better, found_minimum, best[1])
        best_gain = torch.where(better, gain, best_gain)

    span = high - low
    cuts = CUTS.get(bits, CUTS[5])
    for below in cuts:
        for above in cuts:
            keep_better(span * ((1 - below - above) / top), -(low + below * span))
    for _ in range(REFINE_ROUNDS):
        keep_better(*best)
    return best


class _Regression:
    """Weighted linear regression of the weights of a group on their levels."""

    def __init__(self, x: Tensor, weights: ErrorWeights, minimum_floor: float) -> None:
        self.x, self.weights, self.minimum_floor = x, weights, minimum_floor
        self.pulled_ones = weights.pull(torch.ones_like(x[:1]))
        if weights.squares.shape[0] > 1:
            self.pulled_ones = weights.squares
        self.total = self.pulled_ones.sum(-1, keepdim=True)
        self.sum_x = dot(self.pulled_ones.expand_as(x), x)

    def solve(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the best scale and minimum for given levels, and what they take off the weighted sum of squares."""
        pulled = self.weights.pull(levels)
        power, cross = dot(pulled, levels), dot(pulled, self.x)
        sum_q = dot(self.pulled_ones.expand_as(levels), levels)
        determinant = self.total * power - sum_q * sum_q
        usable = determinant > 1e-7 * self.total * power
        divisor = torch.where(usable, determinant, torch.ones_like(determinant))
        scale = (self.total * cross - sum_q * self.sum_x) / divisor
        minimum = (sum_q * cross - power * self.sum_x) / divisor
        inside = usable & (minimum >= self.minimum_floor) & (scale > 0)
        held = (cross / power.clamp(min=TINY)).clamp(min=0)  # on the edge, where the minimum is zero
        scale = torch.where(inside, scale, held)
        minimum = torch.where(inside, minimum, torch.zeros_like(minimum))
        gain = scale * (2 * cross - scale * power) + minimum * (
            2 * scale * sum_q - 2 * self.sum_x - minimum * self.total
        )
        return scale, minimum, gain
