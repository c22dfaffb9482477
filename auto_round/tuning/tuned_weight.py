"""One weight while it is tuned: its parameters, what it stands for, and the gradients of its parameters."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.data_types.base import DataType, Range
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, join_rows, rows_of, to_groups

CURVATURE_SHARE = 0.5  # theta: the diagonal ignores what attention couples, so only half of it is believed
CLIP_BOUNDS = (0.5, 1.5)  # around the searched scale; the min-max range is only one of its candidates
# A step works on so many weights at a time: on a GPU (False) and on a CPU (True), where less stays in the cache.
PIECE_ELEMENTS = {False: 1 << 25, True: 1 << 18}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """Diagonal of a weight's Gauss-Newton matrix, of rank one: h_ij = outputs_i * inputs_j, (O,) and (I,) float32.

    Where the weight is several whose rows follow each other, `inputs` is (P, I), a row for each of these parts.
    """

    outputs: Tensor
    inputs: Tensor

    def reached_by(self, gradient_OI: Tensor) -> Curvature:
        """Returns the curvature without that of parts that have no gradient: experts that no token went to."""
        if self.inputs.ndim == 1:
            return self
        reached_P = (gradient_OI.unflatten(0, (len(self.inputs), -1)) != 0).flatten(1).any(1)
        return Curvature(self.outputs * reached_P.repeat_interleave(len(self.outputs) // len(reached_P)), self.inputs)

    def of_rows(self, rows: slice, part_rows: int) -> Curvature:
        """Returns the curvature of some rows: those of whole parts, of `part_rows` each, or of one part."""
        if self.inputs.ndim == 1:
            return Curvature(self.outputs[rows], self.inputs)
        return Curvature(self.outputs[rows], self.inputs[rows.start // part_rows : -(-rows.stop // part_rows)])

    def inputs_of_rows(self) -> Tensor:
        """Returns (O, I), or (1, I) where all rows have the same inputs."""
        if self.inputs.ndim == 1 or len(self.inputs) == 1:
            return self.inputs.view(1, -1)
        return self.inputs.repeat_interleave(len(self.outputs) // len(self.inputs), dim=0)


@dataclasses.dataclass(slots=True, eq=False)
class TunedWeight:
    """One weight while it is tuned, or `parts` equal ones whose rows follow each other; lives as long as its block."""

    weight: Tensor
    scheme: QuantizationScheme
    data_type: DataType
    range_: Range
    params: dict[str, Tensor]
    curvature: Curvature | None
    reach: float
    parts: int = 1

    @property
    def part_rows(self) -> int:
        """Rows of one part."""
        return self.weight.shape[0] // self.parts

    def pieces(self) -> list[tuple[slice, TunedWeight]]:
        """Returns views of some rows each, so that the intermediates of a step stay small; one if scales are shared.

        A piece is some whole parts, or some rows of one.
        """
        rows, width = self.weight.shape
        step = max(1, PIECE_ELEMENTS[self.weight.device.type == "cpu"] // width)
        if step >= rows or not isinstance(self.scheme.group_size, int) or self.scheme.group_size == 0:
            return [(slice(0, rows), self)]
        unit = max(step // self.part_rows, 1) * self.part_rows
        step = min(step, unit) if unit == self.part_rows else unit
        starts = [
            (at, min(first + unit, rows)) for first in range(0, rows, unit) for at in range(first, first + unit, step)
        ]
        cuts = [slice(at, min(at + step, end)) for at, end in starts if at < end]
        return [(cut, self._rows(cut)) for cut in cuts]

    def by_part(self) -> list[TunedWeight]:
        """Returns views of the parts, without curvature."""
        if self.parts == 1:
            return [self]
        bare, size = dataclasses.replace(self, curvature=None), self.part_rows
        return [bare._rows(slice(part * size, (part + 1) * size)) for part in range(self.parts)]

    def reached_by(self, gradient_OI: Tensor) -> TunedWeight:
        """Returns the weight as a step of that gradient sees it: parts without a gradient stay."""
        if self.curvature is None:
            return self
        return dataclasses.replace(self, curvature=self.curvature.reached_by(gradient_OI))

    def _rows(self, rows: slice) -> TunedWeight:
        range_ = {name: tensor[rows] for name, tensor in self.range_.items()}
        params = {name: tensor[rows] for name, tensor in self.params.items()}
        return dataclasses.replace(
            self,
            weight=self.weight[rows],
            range_=range_,
            params=params,
            curvature=self.curvature and self.curvature.of_rows(rows, self.part_rows),
            parts=max(1, (rows.stop - rows.start) // self.part_rows),
        )

    def encoded(self) -> QuantizedTensor:
        """Returns the codes, scales and zero points that the weight stands for now.

        A scale for a whole tensor is that of the first part; `encoded_parts` has each its own.
        """
        pieces = [
            (rows, part.data_type.encode(part.weight, part.scheme, part.range_, part.params))
            for rows, part in self.pieces()
        ]
        return pieces[0][1] if len(pieces) == 1 else join_rows(pieces, self.weight.shape[0])

    def encoded_parts(self, kept: QuantizedTensor | None = None) -> list[QuantizedTensor]:
        """Returns what each part stands for: now, or as `kept` from an earlier step (what `encoded` gave then)."""
        if kept is None:
            return [part.encoded() for part in self.by_part()]
        if self.parts == 1:
            return [kept]
        cuts = [slice(part * self.part_rows, (part + 1) * self.part_rows) for part in range(self.parts)]
        found = [rows_of(kept, cut) for cut in cuts]
        if not self.data_type.has_tensor_scale:
            return found
        wholes = [part.encoded().global_scale for part in self.by_part()]  # not tuned
        return [dataclasses.replace(w, global_scale=whole) for w, whole in zip(found, wholes, strict=True)]

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """Returns (O, I) float32 fake-quantized weights."""
        pieces = [
            part.data_type.fake_quantize(part.weight, part.scheme, part.range_, part.params)
            for _, part in self.pieces()
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gradients(self, gradient_OI: Tensor) -> dict[str, Tensor]:
        """Returns the gradients of the parameters for a gradient of the dequantized weight.

        They are straight-through gradients, to which the curvature adds theta s^2 h (u - round(u)) if it is known.
        """
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.params.items()}
        with torch.enable_grad():
            fake = self.data_type.fake_quantize(self.weight, self.scheme, self.range_, leaves)
        found = dict(zip(leaves, torch.autograd.grad(fake, list(leaves.values()), gradient_OI.float()), strict=True))
        if self.curvature is not None:
            state = self.data_type.rounding_state(self.weight, self.scheme, self.range_, self.params)
            inputs = to_groups(self.curvature.inputs_of_rows(), self.scheme.group_size)
            pull = state.scale.square() * self.curvature.outputs[:, None, None] * inputs * state.residual
            found["rounding"] = found["rounding"] + CURVATURE_SHARE * pull * state.in_range
        return found

    def keep_in_bounds(self) -> None:
        """Clamps offsets to the reach and clip factors to `CLIP_BOUNDS`, in place."""
        for parameter, tensor in self.params.items():
            low, high = (-self.reach, self.reach) if parameter == "rounding" else CLIP_BOUNDS
            tensor.clamp_(low, high)
