"""FP8 weights (E4M3 or E5M2) under scales of a row, a tensor, or a block of rows and columns.

scale = largest magnitude / largest number of the element, rounded to the scheme's scale dtype. FP8's steps are relative
to a number's size, so a smaller scale is no finer grid; the search shifts the grid within one octave instead, which
moves every weight's rounding error, and saturates nothing but what the shift pushes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, MIN_SCALE, Params, Range, RoundingState, cast_ste
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

TRIED_RATIOS = (*(2.0 ** (step / 8) for step in range(8)), 0.95, 0.9, 0.85)


class Fp8DataType:
    """The data types "fp" (E4M3) and "fp_e5m2". Stateless."""

    has_tensor_scale = False

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for other widths than 8 or asymmetry."""
        return float_grid.why_not_element(scheme)

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of the scale dtype."""
        return 32 if scheme.scale_dtype == "float32" else 16

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale"} (O, G, 1)."""
        peaks = float_grid.group_peaks(weight_OI, scheme.group_size)
        return {"scale": _stored(peaks / float_grid.element_of(scheme).largest, scheme)}

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,
    ) -> Range:
        """Returns the scale with the least weighted squared error among shifts of the grid."""
        start = self.minmax_range(weight_OI, scheme, tensor_peak)["scale"]
        candidates = (_stored(start * ratio, scheme) for ratio in TRIED_RATIOS)
        return {"scale": float_grid.best_scale(weight_OI, scheme, importance, candidates)}

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros and max_scale ones, one for each scale, float32."""
        return float_grid.trainable(weight_OI, scheme.group_size)

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params`."""
        return float_grid.fake_quantize(weight_OI, scheme, _scale(weight_OI, scheme, range_, params), params)

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns where each weight stands between the FP8 numbers."""
        return float_grid.rounding_state(weight_OI, scheme, _scale(weight_OI, scheme, range_, params), params)

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns FP8 codes and scales."""
        scale = _scale(weight_OI, scheme, range_, params)
        codes = float_grid.levels_of(weight_OI, scheme, scale, params)
        return QuantizedTensor(codes, scale.squeeze(-1), None, scheme)


def _stored(scale: Tensor, scheme: QuantizationScheme) -> Tensor:
    return cast_ste(scale, scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])


def _scale(weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
    factors = float_grid.clip_factors(params, weight_OI.shape[0], scheme.group_size)
    return _stored(range_["scale"] * factors, scheme)


for _name in ("fp", "fp_e5m2"):
    DATA_TYPES.register(_name)(Fp8DataType(_name))
