"""One weight while it is tuned: its parameters, what it stands for, and the gradients of its parameters."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.data_types.base import DataType, Range
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, to_groups

CURVATURE_SHARE = 0.5  # theta: the diagonal ignores what attention couples, so only half of it is believed
CLIP_BOUNDS = (0.5, 1.5)  # around the searched scale; the min-max range is only one of its candidates
# A step works on so many weights at a time: on a GPU (False) and on a CPU (True), where less stays in the cache.
PIECE_ELEMENTS = {False: 1 << 25, True: 1 << 18}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """Diagonal of a weight's Gauss-Newton matrix, of rank one: h_ij = outputs_i * inputs_j, (O,) and (I,) float32."""

    outputs: Tensor
    inputs: Tensor


@dataclasses.dataclass(slots=True, eq=False)
class TunedWeight:
    """One weight while it is tuned; lives only as long as its block."""

    weight: Tensor
    scheme: QuantizationScheme
    data_type: DataType
    range_: Range
    params: dict[str, Tensor]
    curvature: Curvature | None
    reach: float

    def pieces(self) -> list[tuple[slice, TunedWeight]]:
        """Returns views of some rows each, so that the intermediates of a step stay small; one if scales are shared."""
        rows, width = self.weight.shape
        step = max(1, PIECE_ELEMENTS[self.weight.device.type == "cpu"] // width)
        if step >= rows or not isinstance(self.scheme.group_size, int) or self.scheme.group_size == 0:
            return [(slice(0, rows), self)]
        return [(slice(start, start + step), self._rows(slice(start, start + step))) for start in range(0, rows, step)]

    def _rows(self, rows: slice) -> TunedWeight:
        curvature = self.curvature and Curvature(self.curvature.outputs[rows], self.curvature.inputs)
        range_ = {name: tensor[rows] for name, tensor in self.range_.items()}
        params = {name: tensor[rows] for name, tensor in self.params.items()}
        return dataclasses.replace(self, weight=self.weight[rows], range_=range_, params=params, curvature=curvature)

    def encoded(self) -> QuantizedTensor:
        """Returns the codes, scales and zero points that the weight stands for now."""
        return self.data_type.encode(self.weight, self.scheme, self.range_, self.params)

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
            inputs_1GK = to_groups(self.curvature.inputs[None], self.scheme.group_size)
            pull = state.scale.square() * self.curvature.outputs[:, None, None] * inputs_1GK * state.residual
            found["rounding"] = found["rounding"] + CURVATURE_SHARE * pull * state.in_range
        return found

    def keep_in_bounds(self) -> None:
        """Clamps offsets to the reach and clip factors to `CLIP_BOUNDS`, in place."""
        for parameter, tensor in self.params.items():
            low, high = (-self.reach, self.reach) if parameter == "rounding" else CLIP_BOUNDS
            tensor.clamp_(low, high)
