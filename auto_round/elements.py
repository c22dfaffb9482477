"""Number formats of a single stored value besides integers: FP4, FP6, FP8, and the fixed-point elements of MXINT.

An element format is a small table of numbers. Values here are float32 in units of the scale. Rounding is to nearest,
ties to even, and saturates at the largest finite number, as the OCP Microscaling specification v1.0 (section 6) and
the OCP FP8 specification ask. Codes are the sign bit above the magnitude bits, which are in the order of magnitude.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FloatElement:
    """A sign, `exponent_bits` and `mantissa_bits`; exponent 0 holds subnormal numbers.

    Attributes:
        largest: the largest finite magnitude.
        bias: of the exponent.
        max_exponent: exponent of the largest power of two it holds ("emax"), which MX scales are chosen by.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    bias: int
    max_exponent: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def fraction_bits(self) -> int:
        """Bits below the leading one: numbers around 2**n are 2**(n - fraction_bits) apart."""
        return self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the least normal number ("emin"), below which distances stay the same."""
        return 1 - self.bias

    @property
    def offsets_count_scales(self) -> bool:
        """Whether rounding offsets are in units of the scale, not of the distance between numbers.

        FP4's distances are 0.5, 1 and 2. Offsets in units of 1 can move its small numbers by a whole step and its large
        ones by a quarter, which tunes better than half a step everywhere. FP6 and FP8 have distances too far apart.
        """
        return self.bits == 4

    def spacing(self, x: Tensor) -> Tensor:
        """Returns the distance between neighbouring numbers around each x, a power of two."""
        return power_of_two(self._exponent(x.abs().clamp(max=self.largest)) - self.mantissa_bits)

    def offset_unit(self, x: Tensor) -> Tensor:
        """Returns the unit of rounding offsets around each x."""
        return torch.ones_like(x) if self.offsets_count_scales else self.spacing(x)

    def round(self, x: Tensor) -> Tensor:
        """Returns the nearest number of the format for each x, float32."""
        step = self.spacing(x)
        return ((x / step).round() * step).clamp(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Returns uint8 codes of numbers of the format, as `round` gives them."""
        magnitude, exponent = values.abs(), self._exponent(values.abs())
        whole = 2**self.mantissa_bits
        mantissa = (
            (magnitude / power_of_two(exponent - self.mantissa_bits)).round().to(torch.int32)
        )  # whole..2*whole-1 for normal numbers, less below
        field = torch.where(mantissa >= whole, (exponent + self.bias) * whole + mantissa - whole, mantissa)
        sign = torch.signbit(values).to(torch.int32) << (self.bits - 1)
        return (field.to(torch.int32) | sign).to(torch.uint8)

    def nearest_codes(self, x: Tensor) -> Tensor:
        """Returns what `encode(round(x))` does, uint8, for float32 numbers that are not NaN, in a fifth of the time.

        The leading bits of a float32 number are its code, but for the bias: rounding them is rounding to the format.
        Subnormal numbers are multiples of the smallest one. A float below the smallest normal number has leading bits
        that stand for less than its multiple, one above has a multiple of at least `whole`; so the larger one counts.
        """
        whole, dropped = 2**self.mantissa_bits, 23 - self.mantissa_bits
        magnitude = x.abs()
        bits = magnitude.view(torch.int32)
        odd = (bits >> dropped).bitwise_and_(1)
        leading = odd.add_(bits).add_((1 << (dropped - 1)) - 1).bitwise_right_shift_(dropped)
        leading.sub_((127 - self.bias) * whole)
        multiple = magnitude.mul_(2.0 ** (self.bias - 1 + self.mantissa_bits)).clamp_(max=whole).round_()
        codes = torch.maximum(leading, multiple.to(torch.int32)).clamp_(max=self._largest_code)
        sign = (x.view(torch.int32) >> (32 - self.bits)).bitwise_and_(1 << (self.bits - 1))
        return codes.bitwise_or_(sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the float32 numbers of uint8 codes."""
        return _decoded(self, codes.device)[codes.long()]

    @property
    def _largest_code(self) -> int:
        """Code of the largest finite number."""
        mantissa, exponent = math.frexp(self.largest)
        return round((exponent - 1 + self.bias + 2 * mantissa - 1) * 2**self.mantissa_bits)

    def _exponent(self, magnitude: Tensor) -> Tensor:
        return floor_log2(magnitude).clamp(min=self.min_exponent)


@dataclasses.dataclass(frozen=True, slots=True)
class FixedElement:
    """Two's-complement integers with an implied scale of 2**-fraction_bits; the most negative code is not used.

    Attributes:
        min_exponent, max_exponent: as of a float element whose numbers are all as far apart as those around 1.
        offsets_count_scales: as of `FloatElement`.
    """

    name: str
    bits: int
    fraction_bits: int
    min_exponent: int = 0
    max_exponent: int = 0
    offsets_count_scales: bool = False

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return (2 ** (self.bits - 1) - 1) / 2**self.fraction_bits

    def spacing(self, x: Tensor) -> Tensor:
        """Returns the distance between neighbouring numbers, the same everywhere."""
        return torch.full_like(x, 2.0**-self.fraction_bits)

    def offset_unit(self, x: Tensor) -> Tensor:
        """Returns the unit of rounding offsets, a step."""
        return self.spacing(x)

    def round(self, x: Tensor) -> Tensor:
        """Returns the nearest number of the format for each x, float32."""
        unit = 2.0**self.fraction_bits
        return ((x * unit).round() / unit).clamp(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Returns uint8 codes (two's complement in the low bits) of numbers of the format."""
        whole = (values * 2.0**self.fraction_bits).round().to(torch.int32)
        return (whole & (2**self.bits - 1)).to(torch.uint8)

    def nearest_codes(self, x: Tensor) -> Tensor:
        """Returns what `encode(round(x))` does."""
        return self.encode(self.round(x))

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the float32 numbers of uint8 codes."""
        whole = codes.to(torch.int32)
        negative = whole >= 2 ** (self.bits - 1)
        return torch.where(negative, whole - 2**self.bits, whole).float() / 2.0**self.fraction_bits


Element = FloatElement | FixedElement


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns 2**exponent as float32, exactly, for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def floor_log2(magnitude: Tensor) -> Tensor:
    """Returns the int32 exponent of the largest power of two in each float32 number >= 0; -127 below 2**-126.

    Reads the exponent field, which takes a tenth of the time of `torch.frexp` on a CPU.
    """
    return (magnitude.view(torch.int32) >> 23) - 127


@lru_cache(maxsize=32)
def _decoded(element: FloatElement, device: torch.device) -> Tensor:
    """Returns the number of every code of a float format, (2**bits,) float32; codes beyond the largest are NaN."""
    whole = 2**element.mantissa_bits
    numbers = []
    for code in range(2 ** (element.bits - 1)):
        exponent, mantissa = divmod(code, whole)
        fraction = mantissa / whole + (1 if exponent else 0)
        number = fraction * 2.0 ** (max(exponent, 1) - element.bias)
        numbers.append(number if number <= element.largest else float("nan"))
    positive = torch.tensor(numbers, dtype=torch.float32, device=device)
    return torch.cat([positive, -positive])


# Largest values and emax: OCP Microscaling Formats v1.0, table 1; E4M3 is the "FN" form without infinities.
E2M1 = FloatElement("e2m1", 2, 1, largest=6.0, bias=1, max_exponent=2)
E2M3 = FloatElement("e2m3", 2, 3, largest=7.5, bias=1, max_exponent=2)
E3M2 = FloatElement("e3m2", 3, 2, largest=28.0, bias=3, max_exponent=4)
E4M3 = FloatElement("e4m3", 4, 3, largest=448.0, bias=7, max_exponent=8)
E5M2 = FloatElement("e5m2", 5, 2, largest=57344.0, bias=15, max_exponent=15)
MXINT8 = FixedElement("mxint8", 8, fraction_bits=6)
MXINT4 = FixedElement("mxint4", 4, fraction_bits=2)

# (data type, bits) -> element. "int" is not here: its codes are plain integers with a zero point.
ELEMENTS: dict[tuple[str, int], Element] = {
    ("mx_fp", 4): E2M1,
    ("mx_fp", 6): E2M3,
    ("mx_fp", 8): E4M3,
    ("mx_fp_e3m2", 6): E3M2,
    ("mx_fp_e5m2", 8): E5M2,
    ("mx_int", 4): MXINT4,
    ("mx_int", 8): MXINT8,
    ("nv_fp", 4): E2M1,
    ("fp", 8): E4M3,
    ("fp_e5m2", 8): E5M2,
}


def largest_level(data_type: str, bits: int) -> float:
    """Returns the largest magnitude that a symmetric type holds, in units of the scale: 127 for 8-bit integers."""
    return 2.0 ** (bits - 1) - 1 if data_type == "int" else ELEMENTS[data_type, bits].largest
