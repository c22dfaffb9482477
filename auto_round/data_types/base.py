"""A data type says how the numbers of a weight are chosen and encoded. Pure functions of tensors.

Tuning sees a weight as W_hat = decode(encode(W + rounding; range, clip)). `range` is fixed while a block is tuned; the
trainable parameters are the rounding offset V, one per weight in units of the scale, and clip factors, one or two per
group. `fake_quantize` is differentiable in them through the straight-through estimator.

Shape letters as in tensors.py: O out features, I in features, G groups of a row, K group size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import GroupSize, QuantizedTensor, to_groups

# Smallest magnitude of a scale: float16 keeps 7 significant bits there. A group of zeros gets this scale. They are
# powers of two, because each must be a number of its dtype: what is stored has to be what was tuned.
MIN_SCALE = {"float16": 2.0**-17, "bfloat16": 2.0**-27, "float32": 2.0**-27}

Range = Mapping[str, Tensor]
Params = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class RoundingState:
    """Where each weight stands on the grid, for steps that look at more than the straight-through gradient.

    Attributes:
        scale: (O, G, K or 1) float32 unit of the offsets, in units of the weight.
        residual: (O, G, K) latent value minus its rounded value, in that unit.
        in_range: (O, G, K) bool, whether rounding did not hit an end of the grid.
    """

    scale: Tensor
    residual: Tensor
    in_range: Tensor


class DataType(Protocol):
    """One way to represent weights. Registered in DATA_TYPES under the scheme's `data_type`.

    `tensor_peak` is the largest magnitude, () float32, of all weights that serving engines join with this one; None: of
    this weight alone. Only a type with `has_tensor_scale` looks at it, so that the joined weights share it.

    Parameters are those of `trainable`; `encode` also takes UNTOUCHED, which stands for fresh ones and costs nothing.
    """

    name: str
    has_tensor_scale: bool

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns why a scheme makes no sense for this type (its bits, groups or symmetry), or None."""
        ...

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a group's scale and zero point together, as they are stored."""
        ...

    def minmax_range(self, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None = None) -> Range:
        """Returns the range that covers every weight of its group: plain round-to-nearest."""
        ...

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,
    ) -> Range:
        """Returns the range with the least squared error of the layer's output.

        Args:
            importance: (I,) mean square of each input channel, or (G, K, K) mean products of the channels of each
                group; None weighs all channels alike.
        """
        ...

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns fresh float32 parameters: `rounding` zeros and clip factors of one."""
        ...

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32 dequantized weights, differentiable in `params`."""
        ...

    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns where each weight stands between the levels of the grid."""
        ...

    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns the codes, scales and zero points that `fake_quantize` stands for, exactly."""
        ...


UNTOUCHED: Params = {}

DATA_TYPES: Registry[DataType] = Registry("data type")

# Searches work on so many elements at a time: on a CPU the float32 intermediates stay in its cache, on a GPU in
# moderate memory.
CHUNK_ELEMENTS = {"cpu": 1 << 17, "gpu": 1 << 25}


def grouped_importance(importance: Tensor | None, weight_OI: Tensor, group_size: GroupSize) -> Tensor:
    """Returns (1, G, K) mean squares of input channels, or (G, K, K) mean products, as they were given; float32."""
    if importance is not None and importance.ndim == 3:
        return importance.float()
    squares_I = weight_OI.new_ones(weight_OI.shape[1], dtype=torch.float32) if importance is None else importance
    return to_groups(squares_I.float()[None], group_size)


def squares_of(importance: Tensor, grouped_OGK: Tensor) -> Tensor:
    """Returns (1, G, K) mean squares: what is given if it is that, else the diagonal of the products."""
    if _is_squares(importance, grouped_OGK):
        return importance
    return torch.diagonal(importance, dim1=1, dim2=2)[None]


def weighted(importance: Tensor, values_OGK: Tensor) -> Tensor:
    """Returns (O, G, K): values times the importance of their channels; products of channels are summed over."""
    if _is_squares(importance, values_OGK):
        return importance * values_OGK
    return torch.einsum("ogk,gkl->ogl", values_OGK, importance)


def _is_squares(importance: Tensor, grouped_OGK: Tensor) -> bool:
    """Whether importance is (1, G, K); products (G, K, K) have another first size, or with one group another second."""
    return importance.shape[0] == 1 and importance.shape[1] == grouped_OGK.shape[1]


def row_pieces(grouped_OGK: Tensor) -> list[slice]:
    """Returns the rows of each piece that a search works on at a time."""
    elements = CHUNK_ELEMENTS["cpu" if grouped_OGK.device.type == "cpu" else "gpu"]
    rows = max(1, elements // (grouped_OGK.shape[1] * grouped_OGK.shape[2]))
    return [slice(start, start + rows) for start in range(0, grouped_OGK.shape[0], rows)]


def round_ste(x: Tensor) -> Tensor:
    """Rounds to the nearest integer, ties to even; the gradient passes unchanged."""
    return x + (x.round() - x).detach()


def offset_by(latent_OGK: Tensor, params: Params) -> Tensor:
    """Returns latent codes with their rounding offsets; the same tensor where nothing was tuned."""
    return latent_OGK + params["rounding"] if "rounding" in params else latent_OGK


def to_codes(latent_OGK: Tensor, zero_point: Tensor | None, bounds: tuple[int, int]) -> Tensor:
    """Returns uint8 codes clamp(round(latent) + zero point, *bounds), counted from the first. Overwrites `latent_OGK`.

    Codes go through signed bytes, less half of the range: torch has vector code for these, but turns a float into an
    unsigned byte one by one, which takes longer than everything else here.

    Args:
        latent_OGK: float32.
        zero_point: (O, G, 1) whole numbers, or None for 0.
        bounds: first and last code, at most 255 apart.
    """
    first, span = bounds[0], bounds[1] - bounds[0]
    half = (span + 1) // 2
    rounded = latent_OGK.round_()
    if zero_point is None:
        rounded.add_(-first - half)
    elif bool((shift := zero_point - (first + half)).any()):  # symmetric integers need none
        rounded.add_(shift)
    return rounded.clamp_(-half, span - half).to(torch.int8).view(torch.uint8).add_(half)


def cast_ste(x: Tensor, dtype_name: str) -> Tensor:
    """Rounds float32 values to what `dtype_name` can hold, the largest finite one at most; the gradient passes."""
    dtype = getattr(torch, dtype_name)
    if dtype == torch.float32:
        return x
    limit = torch.finfo(dtype).max
    held = x.clamp(-limit, limit)  # float16 ends at 65504: without this one huge weight makes a scale of infinity
    return held + (held.to(dtype).float() - held).detach()
