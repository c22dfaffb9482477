"""A layout says how a quantized weight lies in memory: pack and unpack side by side.

`unpack(pack(q)) == q` exactly, so export, inference and tests share one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor


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


LAYOUTS: Registry[Layout] = Registry("layout")
