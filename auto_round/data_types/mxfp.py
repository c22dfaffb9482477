"""Microscaling types: groups of 32 weights under a power of two, elements FP4, FP6, FP8 or fixed point.

The scale is 2**(floor(log2(largest magnitude)) - emax), emax being the exponent of the largest power of two that the
element holds. Source: OCP Microscaling Formats (MX) specification v1.0, section 6.3. It lets values between the largest
number and the next power of two saturate; the search therefore also tries the exponents beside it. The clip factor
multiplies the scale before its exponent is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, Params, Range, RoundingState
from auto_round.elements import Element, floor_log2, power_of_two
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

# Exponents of E8M0 reach from -127 to 127; 2**-127 has no normal float32.
EXPONENT_LIMITS = (-126, 127)
# Besides the specification's: one more for less saturation, one less for a finer grid.
TRIED_EXPONENTS = (0, 1, -1)
GROUP_SIZE = 32
# Element -> peak, in units of a power of two, from which on compressed-tensors takes the next power.
ROUNDS_UP_FROM = {"e2m1": 1.75, "e2m3": 1.9375, "e4m3": 1.75}


class MxDataType:
    """The data types "mx_fp", "mx_fp_e3m2", "mx_fp_e5m2" and "mx_int". Stateless."""

    has_tensor_scale = False

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for widths that have no element, other groups than 32 or asymmetry."""
        if scheme.group_size != GROUP_SIZE:
            return f"group_size={scheme.group_size} (MX has groups of {GROUP_SIZE})"
        return float_grid.why_not_element(scheme)

    def scale_bits(self, scheme: QuantizationScheme) -> int:  # noqa: ARG002
        """Returns 8: an exponent."""
        return 8

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale"} (O, G, 1), the specification's."""
        peaks = float_grid.group_peaks(weight_OI, scheme.group_size)
        return {"scale": shared_scale(peaks, float_grid.element_of(scheme))}

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,
    ) -> Range:
        """Returns the scale with the least weighted squared error among neighbouring exponents."""
        start = self.minmax_range(weight_OI, scheme, tensor_peak)["scale"]
        low, high = (2.0**exponent for exponent in EXPONENT_LIMITS)
        candidates = [(start * 2.0**change).clamp(low, high) for change in TRIED_EXPONENTS]
        return {"scale": float_grid.best_scale(weight_OI, scheme, importance, candidates)}

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros and max_scale (O, G, 1) ones, float32."""
        return float_grid.trainable(weight_OI, scheme.group_size)

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params`."""
        return float_grid.fake_quantize(weight_OI, scheme, _scale(range_, params), params)

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns where each weight stands between the numbers of the element."""
        return float_grid.rounding_state(weight_OI, scheme, _scale(range_, params), params)

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns element codes and powers of two."""
        scale = _scale(range_, params)
        codes = float_grid.levels_of(weight_OI, scheme, scale, params)
        return QuantizedTensor(codes, scale.squeeze(-1), None, scheme)


def shared_scale(peak: Tensor, element: Element) -> Tensor:
    """Returns the specification's power of two for a group whose largest magnitude is `peak`; the least for zeros."""
    return _power(floor_log2(peak) - element.max_exponent, peak)


def rounded_scale(peak: Tensor, element: Element) -> Tensor:
    """Returns the specification's power of two, or the next one where `peak` is nearer to that.

    What compressed-tensors does to activations. Source: generate_mx_scales in its quantization/utils/mxfp_utils.py.
    """
    mantissa, exponent = torch.frexp(peak)  # peak = 2 * mantissa * 2**(exponent - 1), with 2 * mantissa in [1, 2)
    exponent = exponent.to(torch.int32) - 1 + (mantissa >= ROUNDS_UP_FROM[element.name] / 2).to(torch.int32)
    return _power(exponent - element.max_exponent, peak)


def covering_scale(peak: Tensor, element: Element) -> Tensor:
    """Returns the least power of two under which nothing saturates, called "rceil"; what NVIDIA's kernels do."""
    return _power(-floor_log2(element.largest / peak.clamp(min=2.0**-100)), peak)


def _power(exponent: Tensor, peak: Tensor) -> Tensor:
    exponent = torch.where(peak > 0, exponent, EXPONENT_LIMITS[0])
    return power_of_two(exponent.clamp(*EXPONENT_LIMITS))


def _scale(range_: Range, params: Params) -> Tensor:
    """Returns the power of two nearest (in exponent) to range times clip factor; the gradient passes unchanged."""
    wanted = range_["scale"] * params["max_scale"]
    exponent = torch.log2(wanted.detach()).round().to(torch.int32).clamp(*EXPONENT_LIMITS)
    return wanted + (power_of_two(exponent) - wanted).detach()


for _name in ("mx_fp", "mx_fp_e3m2", "mx_fp_e5m2", "mx_int"):
    DATA_TYPES.register(_name)(MxDataType(_name))
