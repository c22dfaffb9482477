"""A layout says how a quantized weight lies in memory: pack and unpack side by side.

`unpack(pack(q)) == q` exactly, so export, inference and tests share one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from auto_round.elements import largest_level
from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

# Local tensor name -> (shape, dtype name).
Specs = dict[str, tuple[tuple[int, ...], str]]


class Layout(Protocol):
    """Bits in memory of one weight."""

    @property
    def name(self) -> str:
        """Its name in the registry."""
        ...

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight of this scheme and (out, in) shape cannot be held, or None."""
        ...

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns local tensor names (`qweight` ...) -> tensors."""
        ...

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        ...

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns local tensor names -> (shape, dtype name), without packing anything."""
        ...


def why_not_integer_groups(scheme: QuantizationScheme) -> str | None:
    """Returns why a scheme is no integer grid with one scale per group or row, or None."""
    if scheme.data_type != "int":
        return f"data_type={scheme.data_type} (only int)"
    if scheme.group_size == 0:
        return "group_size=0, one scale per tensor (only groups, or -1 for one scale per row)"
    return None


def input_scale_specs(scheme: QuantizationScheme) -> Specs:
    """Returns the spec of `input_scale` where activation ranges are calibrated, else nothing."""
    if scheme.activation is None or not scheme.activation.needs_calibration:
        return {}
    return {"input_scale": ((1,), scheme.scale_dtype)}


def pack_input_scale(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Returns `input_scale` (1,) = peak / largest number of the input, where the peak is known, else nothing."""
    if weight.input_peak is None:
        return {}
    scale = (weight.input_peak / _largest_input(weight.scheme)).to(getattr(torch, weight.scheme.scale_dtype))
    return {"input_scale": scale.reshape(1)}


def unpack_input_peak(tensors: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor | None:
    """Returns the peak () that `input_scale` stands for, in float64, so that packing it again gives the same scale."""
    if "input_scale" not in tensors:
        return None
    return tensors["input_scale"].double().reshape(()) * _largest_input(scheme)


def _largest_input(scheme: QuantizationScheme) -> float:
    assert scheme.activation is not None
    return largest_level(scheme.activation.data_type, scheme.activation.bits)


LAYOUTS: Registry[Layout] = Registry("layout")
