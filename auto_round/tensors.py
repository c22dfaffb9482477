"""Quantized weights as plain data, and the arithmetic of groups.

Shape letters: O out features, I in features, G groups of a row, K group size. A row whose length the group size does
not divide has a shorter last group; in grouped form that group is padded with zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from auto_round.elements import ELEMENTS
from auto_round.schemes import QuantizationScheme

GroupSize = int | tuple[int, int]
VALUES_AT_A_TIME = 1 << 20


def effective_group_size(group_size: GroupSize, in_features: int) -> int:
    """Returns the number of weights that share a scale along a row (`in_features` for -1)."""
    if isinstance(group_size, tuple):
        return group_size[1]
    return in_features if group_size in (-1, 0) else group_size


def group_count(in_features: int, group_size: GroupSize) -> int:
    """Returns the number of groups of a row, a shorter last one included."""
    size = effective_group_size(group_size, in_features)
    return -(-in_features // size)


def to_groups(weight_OI: Tensor, group_size: GroupSize) -> Tensor:
    """Returns (O, G, K): rows cut into groups, the last one padded with zeros."""
    rows, width = weight_OI.shape
    size = effective_group_size(group_size, width)
    padding = -width % size
    if padding:
        weight_OI = torch.nn.functional.pad(weight_OI, (0, padding))
    return weight_OI.reshape(rows, -1, size)


def from_groups(grouped_OGK: Tensor, in_features: int) -> Tensor:
    """Returns (O, I), the inverse of `to_groups`."""
    return grouped_OGK.reshape(grouped_OGK.shape[0], -1)[:, :in_features]


def expand_groups(per_group_OG: Tensor, group_size: GroupSize, in_features: int) -> Tensor:
    """Returns (O, I): the value of its group for each weight."""
    size = effective_group_size(group_size, in_features)
    return per_group_OG.repeat_interleave(size, dim=1)[:, :in_features]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A quantized weight: the only thing a tuner gives and an exporter takes.

    Attributes:
        codes: (O, I) uint8: stored integers in [0, 2**bits), or codes of the data type's element format.
        scale: (O, G) float32, exactly representable in the stored form of scales; may be negative for integers. Where
            rows share a scale (blocks, whole tensors), each row has it.
        zero_point: (O, G) uint8 on the grid of codes; None when symmetric, or where codes are no integers.
        scheme: the scheme, with the group size that was really used.
        global_scale: () float32 that scales were multiplied by before they were stored (NVFP4), or None.
        offset: (O, G) float32, added to codes times scale where groups have a minimum and no zero point, or None.
        super_scale: (O, S) float32, of which the scales of `super_group_size` neighbouring groups are whole multiples
            (double quantization), or None.
        super_offset: (O, S) float32, not negative, of which the offsets are whole multiples, or None.
        input_peak: () float32, the largest magnitude of the layer's input seen in calibration; float64 where it was
            read back, so that the stored scale comes out of it again. None unless activations have calibrated ranges.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantizationScheme
    global_scale: Tensor | None = None
    input_peak: Tensor | None = None
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        groups = (rows, group_count(width, self.scheme.group_size))
        assert self.codes.dtype == torch.uint8, self.codes.dtype
        assert self.scale.shape == groups, (self.scale.shape, groups)
        assert self.scale.dtype == torch.float32, self.scale.dtype
        assert (self.zero_point is None) == (self.scheme.sym or self.scheme.data_type != "int")
        assert self.zero_point is None or self.zero_point.shape == groups
        assert self.offset is None or self.offset.shape == groups

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return self.codes.shape[0], self.codes.shape[1]

    def zero_points(self) -> Tensor:
        """Returns (O, G) uint8 zero points of integer codes, the constant one included when symmetric."""
        if self.zero_point is not None:
            return self.zero_point
        return torch.full_like(self.scale, 2 ** (self.scheme.bits - 1), dtype=torch.uint8)

    def levels(self) -> Tensor:
        """Returns (O, I) float32: what the codes stand for, in units of the scale."""
        element = ELEMENTS.get((self.scheme.data_type, self.scheme.bits))
        if element is not None:
            return element.decode(self.codes)
        if self.offset is not None:
            return self.codes.float()
        zero_OI = expand_groups(self.zero_points().float(), self.scheme.group_size, self.shape[1])
        return self.codes.float() - zero_OI

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns (O, I) weights, levels times scale (over the global scale) plus offset, in float32, then `dtype`."""
        scale_OG = self.scale if self.global_scale is None else self.scale / self.global_scale
        weight_OI = expand_groups(scale_OG, self.scheme.group_size, self.shape[1]) * self.levels()
        if self.offset is not None:
            weight_OI = weight_OI + expand_groups(self.offset, self.scheme.group_size, self.shape[1])
        return weight_OI.to(dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Returns the same weight on another device."""
        tensors = ((name, getattr(self, name)) for name in TENSOR_FIELDS)
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors if tensor is not None}
        return dataclasses.replace(self, **moved)


# Fields of QuantizedTensor that hold tensors, those that may be None last.
TENSOR_FIELDS = ("codes", "scale", "zero_point", "global_scale", "input_peak", "offset", "super_scale", "super_offset")
# Those of them with a row for each row of the weight.
ROW_FIELDS = ("codes", "scale", "zero_point", "offset", "super_scale", "super_offset")


def rows_of(weight: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Returns some rows of a weight, as views; what all rows share is shared further."""
    fields = ((name, getattr(weight, name)) for name in ROW_FIELDS)
    some: dict[str, Any] = {name: tensor[rows] for name, tensor in fields if tensor is not None}
    return dataclasses.replace(weight, **some)


def join_rows(pieces: Iterable[tuple[slice, QuantizedTensor]], row_count: int) -> QuantizedTensor:
    """Returns the weight whose rows are those of the pieces; what is no row is the first one's.

    Args:
        pieces: rows and what they are; each may be made when the one before was copied.
        row_count: rows of the whole, all of which are in some piece.
    """
    joined: QuantizedTensor | None = None
    for rows, piece in pieces:
        own = {name: tensor for name in ROW_FIELDS if (tensor := getattr(piece, name)) is not None}
        if joined is None:
            whole: dict[str, Any] = {n: t.new_empty((row_count, *t.shape[1:])) for n, t in own.items()}
            joined = dataclasses.replace(piece, **whole)
        for name, tensor in own.items():
            getattr(joined, name)[rows] = tensor
    assert joined is not None
    return joined


def dequantize_by_rows(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Returns what `dequantize` does, made some rows at a time.

    The float32 intermediates of a whole layer would be larger than a 16-bit block.
    """
    step = max(1, VALUES_AT_A_TIME // weight.shape[1])
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        dense[rows] = rows_of(weight, rows).dequantize(dtype)  # each row has scales of its own, also where rows share
    return dense


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlockResult:
    """What tuning one block gives.

    Attributes:
        weights: parameter name within the model (".weight" included) -> quantized weight.
        plain: parameter name -> new 16-bit value (tuned norms and biases), empty by default.
        first_loss, best_loss: mean squared error of the block's output before tuning and at the kept step.
        best_step: the kept step, 0 for the start.
        losses: mean squared error of each step on its own samples, as many as steps were taken.
        expert_tokens: name of a list of experts -> calibration tokens that were routed to each of them.
        cache_scales: tensor name -> (1,) float32 scale of keys or values in an FP8 cache, empty unless asked for.
        note: why the block did not take the normal way ("" if it did), e.g. a fall-back to rounding.
    """

    weights: Mapping[str, QuantizedTensor]
    plain: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    first_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    note: str = ""
    expert_tokens: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    cache_scales: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    losses: Sequence[float] = ()

    def summary(self) -> dict[str, Any]:
        """Returns the figures without the tensors."""
        return {
            "first_loss": self.first_loss,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "losses": list(self.losses),
            "note": self.note,
            "expert_tokens": dict(self.expert_tokens),
        }
