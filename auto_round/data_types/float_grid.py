"""What the float data types share: a group's weights, in units of its scale, rounded to the numbers of an element.

The rounding offset V is in units of the local distance between numbers, so that V = 0.5 is half a step, but for FP4,
where it is in units of the scale (`offset_unit`): W_hat = scale * round_element(W / scale + V * unit). With V = 0 this
is the arithmetic of the OCP and vendor documents. Data types differ in how scales are chosen and stored (`ScaleRule`),
which is all that their files say.

Shape letters as in tensors.py. Scales here are (O, G, 1) float32; where rows share a scale, each row has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from auto_round.data_types.base import Params, Range, RoundingState, grouped_importance, row_pieces, weighted
from auto_round.elements import ELEMENTS, Element
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import GroupSize, QuantizedTensor, from_groups, to_groups


class ScaleRule(Protocol):
    """How the scales of a float type are chosen and stored. A range is {"scale"} (O, G, 1) and, where the type has a
    scale for the tensor, {"global_scale"} (O, 1, 1), the same for all rows: what a stored scale is divided by."""

    has_tensor_scale: bool

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns why the groups of a scheme make no sense, or None."""
        ...

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a stored scale."""
        ...

    def minmax_range(self, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None) -> Range:
        """Returns the range that covers every weight of its group."""
        ...

    def tried_scales(self, scale_OG1: Tensor, scheme: QuantizationScheme) -> Iterable[Tensor]:
        """Yields the stored scales that a search tries, the given one first."""
        ...

    def stored(self, wanted_OG1: Tensor, scheme: QuantizationScheme) -> Tensor:
        """Returns the storable scales nearest to the wanted ones; the gradient passes unchanged."""
        ...


class FloatDataType:
    """A data type with float elements under scales of some rule. Stateless."""

    def __init__(self, name: str, rule: ScaleRule) -> None:
        self.name, self.rule = name, rule
        self.has_tensor_scale = rule.has_tensor_scale

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for groups that the type has not, widths that have no element, or asymmetry."""
        return self.rule.refuses(scheme) or why_not_element(scheme)

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a stored scale."""
        return self.rule.scale_bits(scheme)

    def minmax_range(self, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None = None) -> Range:
        """Returns the range of the rule."""
        return self.rule.minmax_range(weight_OI, scheme, tensor_peak)

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,
    ) -> Range:
        """Returns the range whose scales have the least weighted squared error among those that the rule tries."""
        start = self.rule.minmax_range(weight_OI, scheme, tensor_peak)
        tried = self.rule.tried_scales(start["scale"], scheme)
        found = best_scale(weight_OI, scheme, importance, tried, start.get("global_scale"))
        return {**start, "scale": found}

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros and max_scale ones, one for each scale, float32."""
        return trainable(weight_OI, scheme.group_size)

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params`."""
        return fake_quantize(weight_OI, scheme, self.effective_scale(weight_OI, scheme, range_, params), params)

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns where each weight stands between the numbers of the element."""
        return rounding_state(weight_OI, scheme, self.effective_scale(weight_OI, scheme, range_, params), params)

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns element codes, stored scales and the tensor's scale, if there is one."""
        stored, whole = self._stored(weight_OI, scheme, range_, params), range_.get("global_scale")
        codes = levels_of(weight_OI, scheme, _effective(stored, whole), params)
        own = None if whole is None else whole[0, 0, 0].clone()
        return QuantizedTensor(codes, stored.squeeze(-1), None, scheme, global_scale=own)

    def effective_scale(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns what numbers of the element are multiplied by, (O, G, 1), differentiable in the clip factors."""
        return _effective(self._stored(weight_OI, scheme, range_, params), range_.get("global_scale"))

    def _stored(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        if not params:
            return self.rule.stored(range_["scale"], scheme)
        factors = clip_factors(params, weight_OI.shape[0], scheme.group_size)
        return self.rule.stored(range_["scale"] * factors, scheme)


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
    codes = element.nearest_codes(_moved(weight_OI, scheme, scale_OG1, params, element))
    return from_groups(codes, weight_OI.shape[1]).contiguous()


def rounding_state(weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params) -> RoundingState:
    """Returns the unit of offsets, distance from the rounded value in it, and whether it was not clipped, (O, G, K)."""
    element = element_of(scheme)
    moved = _moved(weight_OI, scheme, scale_OG1, params, element)
    latent = to_groups(weight_OI.float(), scheme.group_size) / scale_OG1
    unit, half = element.offset_unit(latent), element.spacing(moved) / 2
    residual = (moved - element.round(moved)).clamp(-half, half) / unit
    return RoundingState(scale_OG1 * unit, residual, moved.abs() <= element.largest)


def best_scale(
    weight_OI: Tensor,
    scheme: QuantizationScheme,
    importance: Tensor | None,
    candidates: Iterable[Tensor],
    global_scale: Tensor | None = None,
) -> Tensor:
    """Returns, for each group, the candidate scale with the least weighted squared error, the first one among equals.

    Args:
        importance: as in `data_types.base.DataType.search_range`.
        candidates: (O, G, 1) scales each, as they are stored.
        global_scale: what stored scales are divided by, or None.
    """
    element = element_of(scheme)
    x = to_groups(weight_OI.float(), scheme.group_size)
    importance = grouped_importance(importance, weight_OI, scheme.group_size)
    best, least = None, None
    for scale in candidates:
        effective = _effective(scale, global_scale)
        error = torch.cat([_error(x[rows], importance, effective[rows], element) for rows in row_pieces(x)])
        error = share_over_rows(error, scheme.group_size, "sum")
        if best is None or least is None:
            best, least = scale, error
            continue
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    assert best is not None
    return best


def _effective(stored_OG1: Tensor, global_scale: Tensor | None) -> Tensor:
    return stored_OG1 if global_scale is None else stored_OG1 / global_scale


def _error(x: Tensor, importance: Tensor, scale: Tensor, element: Element) -> Tensor:
    residual = scale * element.round(x / scale) - x
    return torch.linalg.vecdot(weighted(importance, residual), residual).unsqueeze(-1)


def _moved(
    weight_OI: Tensor, scheme: QuantizationScheme, scale_OG1: Tensor, params: Params, element: Element
) -> Tensor:
    latent = to_groups(weight_OI.float(), scheme.group_size) / scale_OG1
    if not params:
        return latent + 0.0  # as offsets of zero do: -0.0 becomes 0.0
    return latent + params["rounding"] * element.offset_unit(latent.detach())
