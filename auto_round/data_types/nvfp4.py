"""NVFP4: groups of 16 FP4 numbers under an FP8 (E4M3) scale, and one float32 scale for the whole tensor.

weight = number * stored scale / global scale, with global scale = 448 * 6 / largest magnitude of the tensor, so that
the largest group's scale is stored as 448. Source: NVIDIA's description of NVFP4; names and direction of the global
scale as in compressed-tensors (`weight_global_scale`). The search tries the neighbouring E4M3 numbers of a scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, Range
from auto_round.elements import E2M1, E4M3
from auto_round.schemes import QuantizationScheme

GROUP_SIZE = 16
SMALLEST_SCALE = 2.0**-9  # of E4M3; a group of zeros gets it
# E4M3 has 8 numbers in each octave, so these reach from about half to 1.4 times the scale that covers the group.
TRIED_STEPS = (0, -1, -2, -3, -4, -5, -6, -7, -8, 1, 2, 3, 4)
LARGEST_CODE = 126  # 448; 127 is NaN


class E4m3UnderTensorScale:
    """The scale rule of NVFP4."""

    has_tensor_scale = True

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for other groups than 16."""
        if scheme.group_size != GROUP_SIZE:
            return f"group_size={scheme.group_size} (NVFP4 has groups of {GROUP_SIZE})"
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:  # noqa: ARG002
        """Returns 8: an E4M3 number."""
        return 8

    def minmax_range(self, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None) -> Range:
        """Returns {"scale"} (O, G, 1), as stored, and {"global_scale"} (O, 1, 1)."""
        peak = weight_OI.abs().amax().float() if tensor_peak is None else tensor_peak.to(weight_OI.device)
        whole = global_scale(peak).expand(weight_OI.shape[0], 1, 1)
        stored = float_grid.group_peaks(weight_OI, scheme.group_size) / E2M1.largest * whole
        return {"scale": E4M3.round(stored).clamp(min=SMALLEST_SCALE), "global_scale": whole}

    def tried_scales(self, scale_OG1: Tensor, scheme: QuantizationScheme) -> Iterator[Tensor]:  # noqa: ARG002
        """Yields the neighbouring E4M3 numbers."""
        codes = E4M3.encode(scale_OG1).to(torch.int32)
        return (E4M3.decode((codes + step).clamp(1, LARGEST_CODE)) for step in TRIED_STEPS)

    def stored(self, wanted_OG1: Tensor, scheme: QuantizationScheme) -> Tensor:  # noqa: ARG002
        """Returns the nearest E4M3 number; the gradient passes unchanged."""
        wanted = wanted_OG1.clamp(SMALLEST_SCALE, E4M3.largest)
        return wanted + (E4M3.round(wanted.detach()) - wanted).detach()


def global_scale(peak: Tensor) -> Tensor:
    """Returns 448 * 6 / peak, float32; 1 for a tensor of zeros."""
    return torch.where(peak > 0, E4M3.largest * E2M1.largest / peak.clamp(min=1e-30), torch.ones_like(peak)).float()


DATA_TYPES.register("nv_fp")(float_grid.FloatDataType("nv_fp", E4m3UnderTensorScale()))
