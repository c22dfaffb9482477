"""Integers of 2 to 8 bits, symmetric over the full range or asymmetric.

Symmetric: the side of a group with the larger magnitude is mapped to code 0, i.e. to -2**(bits-1), which has one level
more than the other side. The scale is therefore signed: scale = extreme / -2**(bits-1), zero point 2**(bits-1).
Asymmetric: scale = (high - low) / (2**bits - 1), zero point = round(-low / scale), kept in [1, 2**bits - 1] because the
GPTQ layout stores zero point - 1 and serving engines read it so; only a group without negative weights notices.

W_hat = scale * (clamp(round(W / scale + V) + zero, 0, 2**bits - 1) - zero), everything in float32, scales rounded
to the scheme's scale dtype. Source: SignRound, arXiv 2309.05516, equations 2-4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types.base import (
    DATA_TYPES,
    MIN_SCALE,
    Params,
    Range,
    cast_ste,
    grouped_importance,
    round_ste,
)
from auto_round.data_types.int_search import search_asymmetric, search_symmetric
from auto_round.data_types.integer_grid import IntegerGrid, IntegerGridDataType
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import to_groups

MIN_ZERO_POINT = 1


class IntDataType(IntegerGridDataType):
    """The data type "int". Stateless."""

    name = "int"

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for blocks of rows and columns; every width and symmetry is fine."""
        if isinstance(scheme.group_size, tuple):
            return f"group_size={scheme.group_size} (integers have groups of one row: a number, -1 or 0)"
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a scale and, stored or not, of its zero point."""
        return (32 if scheme.scale_dtype == "float32" else 16) + scheme.bits

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale"} (symmetric) or {"low", "high"} (asymmetric), each (O, G, 1) float32."""
        grouped = to_groups(weight_OI.float(), scheme.group_size)
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        high = grouped.amax(-1, keepdim=True).clamp(min=0)
        if scheme.group_size == 0:
            low, high = low.amin().expand_as(low).clone(), high.amax().expand_as(high).clone()
        if not scheme.sym:
            return {"low": low, "high": high}
        extreme = torch.where(high < -low, low, high)
        return {"scale": _away_from_zero(extreme / -(2.0 ** (scheme.bits - 1)), scheme)}

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns the range of least weighted squared error; `importance` None weighs all channels alike.

        One scale per tensor (group_size 0) has no search: its range is `minmax_range`.
        """
        start = self.minmax_range(weight_OI, scheme)
        if scheme.group_size == 0:
            return start
        grouped = to_groups(weight_OI.float(), scheme.group_size)
        importance = grouped_importance(importance, weight_OI, scheme.group_size)
        if scheme.sym:
            scale = search_symmetric(grouped, importance, scheme, start["scale"])
            return {"scale": _away_from_zero(scale, scheme)}
        scale, zero = search_asymmetric(grouped, importance, scheme, start["low"], start["high"], MIN_ZERO_POINT)
        return {"low": -zero * scale, "high": (2**scheme.bits - 1 - zero) * scale}

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros and max_scale (and min_scale when asymmetric) (O, G, 1) ones, float32."""
        params = super().trainable(weight_OI, scheme)
        rounding = params["rounding"]
        clip_shape = (1, 1, 1) if scheme.group_size == 0 else (*rounding.shape[:2], 1)
        for name in ("max_scale",) if scheme.sym else ("max_scale", "min_scale"):
            params[name] = rounding.new_ones(clip_shape)
        return params

    def grid(self, scheme: QuantizationScheme, range_: Range, params: Params) -> IntegerGrid:
        """Returns the levels with scale and zero point as they are stored."""
        bounds, top = (0, 2**scheme.bits - 1), 2**scheme.bits - 1
        if scheme.sym:
            wanted = range_["scale"] * params["max_scale"] if params else range_["scale"]
            scale = _away_from_zero(cast_ste(wanted, scheme.scale_dtype), scheme)
            return IntegerGrid(scale, bounds, zero=torch.full_like(scale, 2 ** (scheme.bits - 1)))
        low, high = range_["low"], range_["high"]
        if params:
            low, high = low * params["min_scale"], high * params["max_scale"]
        scale = cast_ste((high - low) / top, scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])
        return IntegerGrid(scale, bounds, zero=torch.clamp(round_ste(-low / scale), MIN_ZERO_POINT, top))

    def stored(self, grid: IntegerGrid, scheme: QuantizationScheme, range_: Range) -> dict[str, Tensor | None]:  # noqa: ARG002
        """Returns {"zero_point"} (O, G) uint8, None when symmetric."""
        assert grid.zero is not None
        return {"zero_point": None if scheme.sym else grid.zero.squeeze(-1).to(torch.uint8)}


def _away_from_zero(scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    floor = MIN_SCALE[scheme.scale_dtype]
    return torch.where(scale < 0, scale.clamp(max=-floor), scale.clamp(min=floor))


DATA_TYPES.register("int")(IntDataType())
