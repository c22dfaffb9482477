"""Scale (and zero point) of least weighted squared error for integer grids.

For given codes q the best scale has a closed form, s = sum(w q x) / sum(w q q), and so has the error it leaves. So each
candidate on a grid of ratios of the min-max scale is rounded once and judged at its refitted scale; the winner is then
refined by rounding and refitting in turn. Both signs of a symmetric scale are tried, because the side with one level
more need not be the side of the largest weight. See docs/algorithms.md.

The importance of a group's channels is their mean squares, or the mean products of any two of them: the error of the
layer's output is then exact within the group, not only for channels that are independent.

Shapes: grouped (O, G, K), importance (1, G, K) or (G, K, K), scales (O, G, 1); all float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types.base import MIN_SCALE, cast_ste, row_pieces, squares_of, weighted
from auto_round.schemes import QuantizationScheme

# Around what the search over single channels found, products of channels choose again.
NEAR_RATIOS = (0.8, 0.85, 0.9, 0.95, 0.975, 1.0, 1.025, 1.05, 1.1, 1.15, 1.2)
SYMMETRIC_RATIOS = tuple(0.3 + 0.025 * step for step in range(41))
ASYMMETRIC_RATIOS = tuple(0.4 + 0.05 * step for step in range(15))
REFINE_ROUNDS = 2
CLOSED_FORM_BITS = 4


def search_symmetric(grouped: Tensor, importance: Tensor, scheme: QuantizationScheme, start: Tensor) -> Tensor:
    """Returns (O, G, 1) signed scales.

    Args:
        start: (O, G, 1) the min-max scale; it is among the candidates.
    """
    found = []
    for rows in row_pieces(grouped):
        x, squares = grouped[rows], squares_of(importance, grouped)
        scale = _search_symmetric(x, squares, scheme, start[rows])
        if importance is not squares:
            scale = _near_symmetric(x, importance, scheme, scale)
        found.append(scale)
    return torch.cat(found)


def search_asymmetric(
    grouped: Tensor, importance: Tensor, scheme: QuantizationScheme, low: Tensor, high: Tensor, min_zero: int
) -> tuple[Tensor, Tensor]:
    """Returns (O, G, 1) positive scales and (O, G, 1) zero points in [min_zero, 2**bits - 1]."""
    found = []
    for rows in row_pieces(grouped):
        x, squares = grouped[rows], squares_of(importance, grouped)
        scale, zero = _search_asymmetric(x, squares, scheme, low[rows], high[rows], min_zero)
        if importance is not squares:
            scale, zero = _near_asymmetric(x, importance, scheme, scale, zero, min_zero)
        found.append((scale, zero))
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _refit(
    x: Tensor, importance: Tensor, levels: Tensor, scale: Tensor, scheme: QuantizationScheme
) -> tuple[Tensor, Tensor]:
    """Returns the least-squares scale for fixed levels (codes - zero), as it is stored, and its weighted error.

    The error leaves out the constant sum(w x x). Few bits leave errors far above the rounding of these sums; for more
    the squares are summed one by one.
    """
    pulled = weighted(importance, levels)
    cross = torch.linalg.vecdot(pulled, x).unsqueeze(-1)
    power = torch.linalg.vecdot(pulled, levels).unsqueeze(-1)
    refitted = cross / power.clamp(min=1e-30)
    usable = (power > 0) & (refitted * scale > 0)
    refitted = cast_ste(torch.where(usable, refitted, scale), scheme.scale_dtype)
    floor = MIN_SCALE[scheme.scale_dtype]  # what a smaller scale becomes when it is stored
    refitted = torch.where(refitted < 0, refitted.clamp(max=-floor), refitted.clamp(min=floor))
    if scheme.bits <= CLOSED_FORM_BITS:
        return refitted, refitted * (refitted * power - 2 * cross)
    return refitted, _error(x, importance, levels, refitted, scheme)


def _error(x: Tensor, importance: Tensor, levels: Tensor, scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    """Returns the weighted squared error, (O, G, 1), in the form that `_refit` compares."""
    if scheme.bits <= CLOSED_FORM_BITS:
        pulled = weighted(importance, levels)
        power, cross = torch.linalg.vecdot(pulled, levels), torch.linalg.vecdot(pulled, x)
        return scale * (scale * power.unsqueeze(-1) - 2 * cross.unsqueeze(-1))
    residual = scale * levels - x
    return torch.linalg.vecdot(weighted(importance, residual), residual).unsqueeze(-1)


def _search_symmetric(x: Tensor, importance: Tensor, scheme: QuantizationScheme, start: Tensor) -> Tensor:
    half = 2 ** (scheme.bits - 1)

    def levels_for(scale: Tensor) -> Tensor:
        return (x / scale).round_().clamp_(-half, half - 1)

    best = cast_ste(start, scheme.scale_dtype)
    best_error = _error(x, importance, levels_for(best), best, scheme)
    for ratio in SYMMETRIC_RATIOS:
        for sign in (1.0, -1.0):
            candidate = start * (sign * ratio)
            scale, error = _refit(x, importance, levels_for(candidate), candidate, scheme)
            best, best_error = _keep_better(best, best_error, scale, error)
    for _ in range(REFINE_ROUNDS):
        scale, error = _refit(x, importance, levels_for(best), best, scheme)
        best, best_error = _keep_better(best, best_error, scale, error)
    return best


def _search_asymmetric(
    x: Tensor, importance: Tensor, scheme: QuantizationScheme, low: Tensor, high: Tensor, min_zero: int
) -> tuple[Tensor, Tensor]:
    top = 2**scheme.bits - 1
    floor = torch.finfo(torch.float32).tiny

    def levels_for(scale: Tensor, zero: Tensor) -> Tensor:
        return (x / scale).round_().add_(zero).clamp_(0, top).sub_(zero)

    best_scale = cast_ste((high - low) / top, scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])
    best_zero = (-low / best_scale).round().clamp(min_zero, top)
    best_error = _error(x, importance, levels_for(best_scale, best_zero), best_scale, scheme)
    # A group without negative weights loses the levels below the smallest zero point and needs the larger scale.
    start_scale = torch.maximum(best_scale, high / (top - min_zero))
    for ratio in ASYMMETRIC_RATIOS:
        candidate = start_scale * ratio
        center = (-low * min(ratio, 1.0) / candidate.clamp(min=floor)).round()
        for zero in _zero_candidates(center, top, min_zero, scheme.bits):
            levels = levels_for(candidate, zero)
            scale, error = _refit(x, importance, levels, candidate, scheme)
            best_zero = torch.where(error < best_error, zero, best_zero)
            best_scale, best_error = _keep_better(best_scale, best_error, scale, error)
    for _ in range(REFINE_ROUNDS):
        scale, error = _refit(x, importance, levels_for(best_scale, best_zero), best_scale, scheme)
        best_scale, best_error = _keep_better(best_scale, best_error, scale, error)
    return best_scale, best_zero


def _near_symmetric(x: Tensor, importance: Tensor, scheme: QuantizationScheme, scale: Tensor) -> Tensor:
    """Returns the best of neighbouring scales under products of channels."""
    half = 2 ** (scheme.bits - 1)

    def levels_for(candidate: Tensor) -> Tensor:
        return (x / candidate).round_().clamp_(-half, half - 1)

    best, best_error = scale, _error(x, importance, levels_for(scale), scale, scheme)
    for ratio in NEAR_RATIOS:
        refitted, _ = _refit(x, importance, levels_for(scale * ratio), scale * ratio, scheme)
        # Codes are rounded again for the refitted scale, and products make much of a few codes that change.
        error = _error(x, importance, levels_for(refitted), refitted, scheme)
        best, best_error = _keep_better(best, best_error, refitted, error)
    return best


def _near_asymmetric(
    x: Tensor, importance: Tensor, scheme: QuantizationScheme, scale: Tensor, zero: Tensor, min_zero: int
) -> tuple[Tensor, Tensor]:
    """Returns the best of neighbouring scales and zero points under products of channels."""
    top = 2**scheme.bits - 1

    def levels_for(candidate: Tensor, at: Tensor) -> Tensor:
        return (x / candidate).round_().add_(at).clamp_(0, top).sub_(at)

    best_scale, best_zero = scale, zero
    best_error = _error(x, importance, levels_for(scale, zero), scale, scheme)
    for ratio in NEAR_RATIOS:
        for offset in (-1, 0, 1):
            candidate, at = scale * ratio, (zero + offset).clamp(min_zero, top)
            refitted, _ = _refit(x, importance, levels_for(candidate, at), candidate, scheme)
            error = _error(x, importance, levels_for(refitted, at), refitted, scheme)
            best_zero = torch.where(error < best_error, at, best_zero)
            best_scale, best_error = _keep_better(best_scale, best_error, refitted, error)
    return best_scale, best_zero


def _zero_candidates(center: Tensor, top: int, min_zero: int, bits: int) -> list[Tensor]:
    """Returns every zero point for up to 3 bits, else those within 2 of the range's own."""
    if bits <= 3:
        return [torch.full_like(center, zero) for zero in range(min_zero, top + 1)]
    return [(center + offset).clamp(min_zero, top) for offset in (-2, -1, 0, 1, 2)]


def _keep_better(best: Tensor, best_error: Tensor, scale: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    better = error < best_error
    return torch.where(better, scale, best), torch.where(better, error, best_error)
