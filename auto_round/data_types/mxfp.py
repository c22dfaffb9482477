"""Microscaling types: groups of 32 weights under a power of two, elements FP4, FP6, FP8 or fixed point.

The scale is 2**(floor(log2(largest magnitude)) - emax), emax being the exponent of the largest power of two that the
element holds. Source: OCP Microscaling Formats (MX) specification v1.0, section 6.3. It lets values between the largest
number and the next power of two saturate; the search therefore also tries the exponents beside it. The clip factor
multiplies the scale before its exponent is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from auto_round.data_types import float_grid
from auto_round.data_types.base import DATA_TYPES, Range
from auto_round.elements import Element, floor_log2, power_of_two
from auto_round.schemes import QuantizationScheme

# Exponents of E8M0 reach from -127 to 127; 2**-127 has no normal float32.
EXPONENT_LIMITS = (-126, 127)
# Besides the specification's: one more for less saturation, one less for a finer grid.
TRIED_EXPONENTS = (0, 1, -1)
GROUP_SIZE = 32
# Element -> peak, in units of a power of two, from which on compressed-tensors takes the next power.
ROUNDS_UP_FROM = {"e2m1": 1.75, "e2m3": 1.9375, "e4m3": 1.75}


class PowersOfTwo:
    """The scale rule of the MX types."""

    has_tensor_scale = False

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for other groups than 32."""
        if scheme.group_size != GROUP_SIZE:
            return f"group_size={scheme.group_size} (MX has groups of {GROUP_SIZE})"
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:  # noqa: ARG002
        """Returns 8: an exponent."""
        return 8

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale"} (O, G, 1), the specification's."""
        peaks = float_grid.group_peaks(weight_OI, scheme.group_size)
        return {"scale": shared_scale(peaks, float_grid.element_of(scheme))}

    def tried_scales(self, scale_OG1: Tensor, scheme: QuantizationScheme) -> Iterator[Tensor]:  # noqa: ARG002
        """Yields the neighbouring powers of two."""
        low, high = (2.0**exponent for exponent in EXPONENT_LIMITS)
        return ((scale_OG1 * 2.0**change).clamp(low, high) for change in TRIED_EXPONENTS)

    def stored(self, wanted_OG1: Tensor, scheme: QuantizationScheme) -> Tensor:  # noqa: ARG002
        """Returns the power of two nearest in exponent; the gradient passes unchanged."""
        exponent = torch.log2(wanted_OG1.detach()).round().to(torch.int32).clamp(*EXPONENT_LIMITS)
        return wanted_OG1 + (power_of_two(exponent) - wanted_OG1).detach()


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


for _name in ("mx_fp", "mx_fp_e3m2", "mx_fp_e5m2", "mx_int"):
    DATA_TYPES.register(_name)(float_grid.FloatDataType(_name, PowersOfTwo()))
