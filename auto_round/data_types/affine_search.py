"""Scale and minimum of least weighted squared error where each group stores both as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types.base import MIN_SCALE, Range, cast_ste, row_pieces
from auto_round.data_types.group_fit import TINY, ErrorWeights, dot, error_weights, fit_affine, levels_for
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import to_groups

LARGEST_EXPONENT = 100
IMPROVE_ROUNDS = 2
NEAR_RATIOS = (0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04)


def search_affine(weight_OI: Tensor, scheme: QuantizationScheme, importance: Tensor | None) -> Range:
    """Returns {"scale", "low"}, (O, G, 1) float32 each, as they are stored; `importance` None: all channels alike."""
    grouped = to_groups(weight_OI.float(), scheme.group_size)
    if importance is None:
        importance = weight_OI.new_ones(weight_OI.shape[1], dtype=torch.float32)
    weights = error_weights(importance, weight_OI, scheme.group_size)
    found = [_search(grouped[rows], weights.of_rows(rows), scheme) for rows in row_pieces(grouped)]
    return {"scale": torch.cat([scale for scale, _ in found]), "low": torch.cat([low for _, low in found])}


def _search(grouped: Tensor, weights: ErrorWeights, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    peak = grouped.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(peak).exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    factor = torch.ldexp(torch.ones_like(peak), exponent)  # squares of any float32 number stay finite
    x = grouped / factor
    scale, minimum = fit_affine(x, weights.diagonal(), scheme.bits, minimum_floor=-torch.inf)
    bounds = (0, 2**scheme.bits - 1)
    floor = MIN_SCALE[scheme.scale_dtype]
    pulled_ones = weights.pull(torch.ones_like(x[:1]))
    total = pulled_ones.sum(-1, keepdim=True)

    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(scale, torch.inf)
    for round_number in range(1 + IMPROVE_ROUNDS):
        for ratio in NEAR_RATIOS if round_number else (1.0,):
            start_scale, start_low = (scale, -minimum) if best is None else (best[0] * ratio, best[1])
            levels = levels_for(x, start_scale, -start_low, bounds)
            stored = cast_ste(start_scale * factor, scheme.scale_dtype).clamp(min=floor) / factor
            # The minimum makes good what rounding the scale has done.
            low = dot(pulled_ones.expand_as(x), x - stored * levels) / total.clamp(min=TINY)
            low = cast_ste(low * factor, scheme.scale_dtype) / factor
            levels = levels_for(x, stored, -low, bounds)
            error = weights.error(levels.mul_(stored).add_(low).sub_(x))
            better = error < least
            least = torch.where(better, error, least)
            chosen = (stored, low) if best is None else (best[0], best[1])
            best = torch.where(better, stored, chosen[0]), torch.where(better, low, chosen[1])
    assert best is not None
    return best[0] * factor, best[1] * factor
