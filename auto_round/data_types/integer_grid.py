"""What all integer types have in common: levels of equal distance, counted from an offset or from a zero point.

    W_hat = scale * (clamp(round((W - offset) / scale + V) + zero, first, last) - zero) + offset

A type says what scale, offset and zero point are. Everything is float32; gradients pass rounding unchanged.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.data_types.base import Params, Range, RoundingState, offset_by, round_ste, to_codes
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, from_groups, to_groups


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class IntegerGrid:
    """The levels of a weight's groups, exactly as they are stored.

    Attributes:
        scale: (O, G, 1) distance of levels.
        bounds: first and last code.
        zero: (O, G, 1) code of the offset, or None for 0.
        offset: (O, G, 1) where code `zero` lies, or None for 0.
    """

    scale: Tensor
    bounds: tuple[int, int]
    zero: Tensor | None = None
    offset: Tensor | None = None

    def latent(self, weight_OI: Tensor, scheme: QuantizationScheme, params: Params) -> Tensor:
        """Returns (O, G, K) weights in units of the scale, plus V; a scale of zero divides as if it were 1."""
        grouped = to_groups(weight_OI.float(), scheme.group_size)
        above = grouped if self.offset is None else grouped - self.offset
        return offset_by(above / torch.where(self.scale == 0, 1.0, self.scale), params)

    def codes(self, nearest: Tensor) -> Tensor:
        """Returns codes before they are kept in bounds, from rounded latent weights."""
        return nearest if self.zero is None else nearest + self.zero

    def values(self, codes: Tensor) -> Tensor:
        """Returns (O, G, K) what codes stand for."""
        scaled = self.scale * (codes if self.zero is None else codes - self.zero)
        return scaled if self.offset is None else scaled + self.offset


class IntegerGridDataType:
    """The part of a data type that follows from its grid. Subclasses say `grid` and `stored`."""

    has_tensor_scale = False

    def grid(self, scheme: QuantizationScheme, range_: Range, params: Params) -> IntegerGrid:
        """Returns the levels that a range and clip factors stand for, differentiable in `params`."""
        raise NotImplementedError

    def stored(self, grid: IntegerGrid, scheme: QuantizationScheme, range_: Range) -> dict[str, Tensor | None]:
        """Returns the fields of `QuantizedTensor` besides codes and scales, `zero_point` at least."""
        raise NotImplementedError

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros, float32."""
        return {"rounding": torch.zeros_like(to_groups(weight_OI.float(), scheme.group_size))}

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params` through the straight-through estimator."""
        grid = self.grid(scheme, range_, params)
        codes = grid.codes(round_ste(grid.latent(weight_OI, scheme, params)))
        return from_groups(grid.values(torch.clamp(codes, *grid.bounds)), weight_OI.shape[1])

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns scale (O, G, 1), residual and in_range (O, G, K)."""
        grid = self.grid(scheme, range_, params)
        latent = grid.latent(weight_OI, scheme, params)
        nearest = latent.round()
        codes, (first, last) = grid.codes(nearest), grid.bounds
        return RoundingState(grid.scale, latent - nearest, (codes >= first) & (codes <= last))

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns codes and scales; `encode(...).dequantize()` equals `fake_quantize(...)` bit for bit."""
        grid = self.grid(scheme, range_, params)
        codes = to_codes(grid.latent(weight_OI, scheme, params), grid.zero, grid.bounds)
        codes_OI = from_groups(codes, weight_OI.shape[1]).contiguous()
        return QuantizedTensor(codes_OI, grid.scale.squeeze(-1), scheme=scheme, **self.stored(grid, scheme, range_))
