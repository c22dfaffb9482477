"""auto-round's own layout of FP8 weights: that of compressed-tensors with other shapes and names of the scales.

Source: checkpoints of auto-round 0.16.1 with packing_format "auto_round:fp8_static" and "auto_round:fp8", or without
one where activations are not quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from auto_round.layouts.base import LAYOUTS, Specs
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor


@dataclasses.dataclass(frozen=True, slots=True)
class FlatFp8Layout:
    """weight float8 (O, I); weight_scale (O,) per row or (1,) per tensor, or weight_scale_inv (O/rows, I/columns) of
    blocks, which is multiplied with the codes too; input_scale (1,) where activation ranges are calibrated."""

    name: str = "fp8_flat"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight cannot be held, or None."""
        return LAYOUTS["fp8"].refuses(scheme, shape)

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        found: Specs = dict(LAYOUTS["fp8"].specs(scheme, shape))
        scale_shape, dtype = found.pop("weight_scale")
        flat = scale_shape if isinstance(scheme.group_size, tuple) else scale_shape[:1]
        return found | {scale_name(scheme): (flat, dtype)}

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns weight, the scales and, where it is known, input_scale."""
        tensors = LAYOUTS["fp8"].pack(weight)
        scale = tensors.pop("weight_scale")
        is_block = isinstance(weight.scheme.group_size, tuple)
        return tensors | {scale_name(weight.scheme): scale if is_block else scale.flatten()}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        return LAYOUTS["fp8"].unpack({**tensors, "weight_scale": tensors[scale_name(scheme)]}, scheme, shape)


def scale_name(scheme: QuantizationScheme) -> str:
    """Returns the name of the tensor that holds the scales."""
    return "weight_scale_inv" if isinstance(scheme.group_size, tuple) else "weight_scale"


LAYOUTS.register("fp8_flat")(FlatFp8Layout())
