"""FP8 weights (E4M3 or E5M2) under scales of a row, a tensor, or a block of rows and columns.

scale = largest magnitude / largest number of the element, rounded to the scheme's scale dtype. FP8's steps are relative
to a number's size, so a smaller scale is no finer grid; the search shifts the grid within one octave instead, which
moves every weight's rounding error, and saturates nothing but what the shift pushes out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, MIN_SCALE, Range, cast_ste
from auto_round.schemes import QuantizationScheme

TRIED_RATIOS = (*(2.0 ** (step / 8) for step in range(8)), 0.95, 0.9, 0.85)


class PlainScales:
    """The scale rule of FP8: numbers of the scheme's scale dtype."""

    has_tensor_scale = False

    def refuses(self, scheme: QuantizationScheme) -> str | None:  # noqa: ARG002
        """Returns None: FP8 has groups of every kind."""
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of the scale dtype."""
        return 32 if scheme.scale_dtype == "float32" else 16

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale"} (O, G, 1)."""
        peaks = float_grid.group_peaks(weight_OI, scheme.group_size)
        return {"scale": self.stored(peaks / float_grid.element_of(scheme).largest, scheme)}

    def tried_scales(self, scale_OG1: Tensor, scheme: QuantizationScheme) -> Iterator[Tensor]:
        """Yields shifts of the grid."""
        return (self.stored(scale_OG1 * ratio, scheme) for ratio in TRIED_RATIOS)

    def stored(self, wanted_OG1: Tensor, scheme: QuantizationScheme) -> Tensor:
        """Returns scales rounded to the scale dtype, away from zero; the gradient passes unchanged."""
        return cast_ste(wanted_OG1, scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])


for _name in ("fp", "fp_e5m2"):
    DATA_TYPES.register(_name)(float_grid.FloatDataType(_name, PlainScales()))
