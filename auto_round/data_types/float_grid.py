"""What the float data types share: a group's weights, in units of its scale, rounded to the numbers of an element.

The rounding offset V is in units of the local distance between numbers, so that V = 0.5 is half a step everywhere:
W_hat = scale * round_element(W / scale + V * spacing(W / scale)). With V = 0 this is the arithmetic of the OCP and
vendor documents. Data types differ in how scales are chosen and stored, which is all that their files say.

Shape letters as in tensors.py. Scales here are (O, G, 1) float32; where rows share a scale, each row has it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from auto_round.data_types.base import Params, RoundingState, grouped_importance, row_pieces, weighted
from auto_round.elements import ELEMENTS, Element
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import GroupSize, from_groups, to_groups


def element_of(scheme: QuantizationScheme) -> Element:
    """Returns the element format of a float scheme."""
    return ELEMENTS[scheme.data_type, scheme.bits]


def why_not_element(scheme: QuantizationScheme) -> str | None:
    """Returns why a scheme has no element format or is asymmetric, or None."""
    if (scheme.data_type, scheme.bits) not in ELEMENTS:
        known = sorted(bits for name, bits in ELEMENTS if name == scheme.data_type)
        return f"bits={scheme.bits} (only {', '.join(map(str, known))})"
    return None if scheme.sym else "sym=False (only symmetric)"


def group_peaks(weight_OI: Tensor, group_size: GroupSize) -> Tensor:
    """Returns (O, G, 1) float32: the largest magnitude among the weights that share a scale."""
    peaks = to_groups(weight_OI.float(), group_size).abs().amax(-1, keepdim=True)
    return share_over_rows(peaks, group_size, "amax")


def share_over_rows(per_group_OG1: Tensor, group_size: GroupSize, how: str) -> Tensor:
    """Returns per-group numbers reduced ("amax" or "sum") over the rows that share a scale, repeated for each row."""
    rows = shared_rows(per_group_OG1.shape[0], group_size)
    if rows == 1:
        return per_group_OG1
    if group_size == 0:
        whole = per_group_OG1.amax() if how == "amax" else per_group_OG1.sum()
        return whole.expand_as(per_group_OG1).clone()
    count = per_group_OG1.shape[0]
    padded = torch.nn.functional.pad(per_group_OG1, (0, 0, 0, 0, 0, -count % rows)).unflatten(0, (-1, rows))
    reduced = padded.amax(1, keepdim=True) if how == "amax" else padded.sum(1, keepdim=True)
    return reduced.expand_as(padded).flatten(0, 1)[:count].contiguous()


def shared_rows(row_count: int, group_size: GroupSize) -> int:
    """Returns the number of rows that share a scale."""
    if isinstance(group_size, tuple):
        return group_size[0]
    return row_count if group_size == 0 else 1


def trainable(weight_OI: Tensor, group_size: GroupSize) -> dict[str, Tensor]:
    """Returns rounding (O, G, K) zeros and max_scale ones, one for each scale there is: (O / shared rows, G, 1)."""
    grouped = to_groups(weight_OI.float(), group_size)
    scales = -(-grouped.shape[0] // shared_rows(grouped.shape[0], group_size))
    return {"rounding": torch.zeros_like(grouped), "max_scale": grouped.new_ones(scales, grouped.shape[1], 1)}


def clip_factors(params: Params, row_count: int, group_size: GroupSize) -> Tensor:
    """Returns the clip factor of each row and group, (O, G, 1)."""
    rows = shared_rows(row_count, group_size)
    factors = params["max_scale"]
    return factors if rows == 1 else factors.repeat_interleave(rows, dim=0)[:row_count]


def fake_quantize(weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params) -> Tensor:
    """Returns (O, I) float32, differentiable in the scale and the rounding through the straight-through estimator."""
    element = element_of(scheme)
    moved = _moved(weight_OI, scheme, scale_OG1, params, element)
    inside = moved.clamp(-element.largest, element.largest)
    levels = inside + (element.round(inside.detach()) - inside).detach()
    return from_groups(scale_OG1 * levels, weight_OI.shape[1])


def levels_of(weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params) -> Tensor:
    """Returns (O, I) uint8 codes of what `fake_quantize` rounds to."""
    element = element_of(scheme)
    levels = element.round(_moved(weight_OI, scheme, scale_OG1, params, element))
    return from_groups(element.encode(levels), weight_OI.shape[1]).contiguous()


def rounding_state(weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params) -> RoundingState:
    """Returns step of the grid, distance from the rounded value in steps, and whether it was not clipped, (O, G, K)."""
    element = element_of(scheme)
    moved = _moved(weight_OI, scheme, scale_OG1, params, element)
    spacing = element.spacing(to_groups(weight_OI.float(), scheme.group_size) / scale_OG1)
    residual = ((moved - element.round(moved)) / spacing).clamp(-0.5, 0.5)
    return RoundingState(scale_OG1 * spacing, residual, moved.abs() <= element.largest)


def best_scale(
    weight_OI: Tensor, scheme: QuantizationScheme, importance: Tensor | None, candidates: Iterable[Tensor]
) -> Tensor:
    """Returns, for each group, the candidate scale with the least weighted squared error, the first one among equals.

    Args:
        importance: as in `data_types.base.DataType.search_range`.
        candidates: (O, G, 1) scales each, as they are stored.
    """
    element = element_of(scheme)
    x = to_groups(weight_OI.float(), scheme.group_size)
    importance = grouped_importance(importance, weight_OI, scheme.group_size)
    best, least = None, None
    for scale in candidates:
        error = torch.cat([_error(x[rows], importance, scale[rows], element) for rows in row_pieces(x)])
        error = share_over_rows(error, scheme.group_size, "sum")
        if best is None or least is None:
            best, least = scale, error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best


def _error(x: Tensor, importance: Tensor, scale: Tensor, element: Element) -> Tensor:
    residual = scale * element.round(x / scale) - x
    return torch.linalg.vecdot(weighted(importance, residual), residual).unsqueeze(-1)


def _moved(
    weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params, element: Element
) -> Tensor:
    latent = to_groups(weight_OI.float(), scheme.group_size) / scale_OG1
    return latent + params["rounding"] * element.spacing(latent.detach())
