"""NVFP4: groups of 16 FP4 numbers under an FP8 (E4M3) scale, and one float32 scale for the whole tensor.

weight = number * stored scale / global scale, with global scale = 448 * 6 / largest magnitude of the tensor, so that
the largest group's scale is stored as 448. Source: NVIDIA's description of NVFP4; names and direction of the global
scale as in compressed-tensors (`weight_global_scale`). The search tries the neighbouring E4M3 numbers of a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, Params, Range, RoundingState
from auto_round.elements import E2M1, E4M3
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

GROUP_SIZE = 16
SMALLEST_SCALE = 2.0**-9  # of E4M3; a group of zeros gets it
# E4M3 has 8 numbers in each octave, so these reach from about half to 1.4 times the scale that covers the group.
TRIED_STEPS = (0, -1, -2, -3, -4, -5, -6, -7, -8, 1, 2, 3, 4)
LARGEST_CODE = 126  # 448; 127 is NaN


class NvFp4DataType:
    """The data type "nv_fp". Stateless."""

    name = "nv_fp"
    has_tensor_scale = True

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for other widths than 4, other groups than 16 or asymmetry."""
        if scheme.group_size != GROUP_SIZE:
            return f"group_size={scheme.group_size} (NVFP4 has groups of {GROUP_SIZE})"
        return float_grid.why_not_element(scheme)

    def scale_bits(self, scheme: QuantizationScheme) -> int:  # noqa: ARG002
        """Returns 8: an E4M3 number."""
        return 8

    def minmax_range(self, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None = None) -> Range:
        """Returns {"scale"} (O, G, 1), as stored, and {"global_scale"} (O, 1, 1), the same for all rows."""
        peak = weight_OI.abs().amax().float() if tensor_peak is None else tensor_peak.to(weight_OI.device)
        whole = global_scale(peak).expand(weight_OI.shape[0], 1, 1)
        stored = float_grid.group_peaks(weight_OI, scheme.group_size) / E2M1.largest * whole
        return {"scale": E4M3.round(stored).clamp(min=SMALLEST_SCALE), "global_scale": whole}

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,
    ) -> Range:
        """Returns the stored scales with the least weighted squared error among neighbouring E4M3 numbers."""
        start = self.minmax_range(weight_OI, scheme, tensor_peak)
        whole, codes = start["global_scale"], E4M3.encode(start["scale"]).to(torch.int32)
        tried = (E4M3.decode((codes + step).clamp(1, LARGEST_CODE)) for step in TRIED_STEPS)
        best = float_grid.best_scale(weight_OI, scheme, importance, (stored / whole for stored in tried))
        return {"scale": E4M3.round(best * whole), "global_scale": whole}

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros and max_scale (O, G, 1) ones, float32."""
        return float_grid.trainable(weight_OI, scheme.group_size)

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params`."""
        scale = _stored_scale(range_, params) / range_["global_scale"]
        return float_grid.fake_quantize(weight_OI, scheme, scale, params)

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns where each weight stands between the FP4 numbers."""
        scale = _stored_scale(range_, params) / range_["global_scale"]
        return float_grid.rounding_state(weight_OI, scheme, scale, params)

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns FP4 codes, E4M3 scales and the global scale."""
        stored, whole = _stored_scale(range_, params), range_["global_scale"]
        codes = float_grid.levels_of(weight_OI, scheme, stored / whole, params)
        return QuantizedTensor(codes, stored.squeeze(-1), None, scheme, global_scale=whole[0, 0, 0].clone())


def global_scale(peak: Tensor) -> Tensor:
    """Returns 448 * 6 / peak, float32; 1 for a tensor of zeros."""
    return torch.where(peak > 0, E4M3.largest * E2M1.largest / peak.clamp(min=1e-30), torch.ones_like(peak)).float()


def _stored_scale(range_: Range, params: Params) -> Tensor:
    """Returns the E4M3 number nearest to range times clip factor; the gradient passes unchanged."""
    wanted = (range_["scale"] * params["max_scale"]).clamp(SMALLEST_SCALE, E4M3.largest)
    return wanted + (E4M3.round(wanted.detach()) - wanted).detach()


DATA_TYPES.register("nv_fp")(NvFp4DataType())
