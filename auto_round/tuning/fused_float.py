"""Tuning steps of weights with float or fixed-point elements, MX, NVFP4 and FP8, by `triton_float_step`.

The kernel reads scales and knows no rule of how they are stored, so that a `float_grid.FloatDataType` joins by its name
alone. Where clip factors move too, which they do not unless asked to, the kernel leaves the gradient of each scale, the
data type carries it to the factors, and a second launch writes the dequantized weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.float_grid import FloatDataType, element_of
from auto_round.tensors import effective_group_size, group_count, to_groups
from auto_round.tuning.fused_step import FUSED_WEIGHTS, PROGRAM_ELEMENTS
from auto_round.tuning.tuned_weight import CLIP_BOUNDS, CURVATURE_SHARE, TunedWeight

# A group is worked on in runs of at most so many weights: nothing is shared within it but the scale.
LONGEST_RUN = 256


class FusedFloat:
    """The steps of one weight whose data type is a `FloatDataType`; groups of every kind."""

    def __init__(self, tuned: TunedWeight, dtype: torch.dtype) -> None:
        self.tuned = tuned
        self.weight = tuned.weight.contiguous()
        self.dequantized = torch.empty_like(self.weight, dtype=dtype)
        width = self.weight.shape[1]
        self.group = effective_group_size(tuned.scheme.group_size, width)
        self.groups = group_count(width, tuned.scheme.group_size)
        self.run = min(self.group, LONGEST_RUN)
        self.runs = math.ceil(width / self.run)
        self.scale = self._scale(tuned.params["max_scale"]).contiguous()
        self._launch()

    @staticmethod
    def fits(tuned: TunedWeight) -> bool:
        """Returns whether groups are made of whole runs, or end with the row."""
        width = tuned.weight.shape[1]
        group = effective_group_size(tuned.scheme.group_size, width)
        return group <= LONGEST_RUN or group % LONGEST_RUN == 0 or group >= width

    def move(
        self, gradient_OI: Tensor, decay: Tensor, rounding_size: float, clip_size: float, unit: float = 1.0
    ) -> None:
        """Moves offsets in one pass; where clip factors move, they take a second one."""
        by_scale = self.scale.new_empty(self.weight.shape[0], self.runs) if clip_size > 0 else None
        self._launch(gradient_OI.contiguous(), decay, rounding_size, unit, by_scale)
        if by_scale is not None:
            self._move_factors(by_scale, decay * clip_size)
            self._launch()

    def _scale(self, factors: Tensor) -> Tensor:
        tuned = self.tuned
        assert isinstance(tuned.data_type, FloatDataType)
        return tuned.data_type.effective_scale(tuned.weight, tuned.scheme, tuned.range_, {"max_scale": factors})

    def _move_factors(self, by_scale: Tensor, size: Tensor) -> None:
        """Moves clip factors by the gradients of the scale, (O, runs), and takes the scale that they give."""
        factors = self.tuned.params["max_scale"]
        by_scale_OG1 = to_groups(by_scale, math.ceil(self.group / self.run)).sum(-1, keepdim=True)
        leaf = factors.detach().requires_grad_()
        with torch.enable_grad():
            (by_factors,) = torch.autograd.grad(self._scale(leaf), leaf, by_scale_OG1)
        factors.sub_(by_factors.sign() * size).clamp_(*CLIP_BOUNDS)
        self.scale.copy_(self._scale(factors))

    def _launch(
        self,
        gradient: Tensor | None = None,
        decay: Tensor | None = None,
        rounding_size: float = 0.0,
        unit: float = 1.0,
        by_scale: Tensor | None = None,
    ) -> None:
        """Writes `dequantized`, after a step if there is a gradient; or, if asked for, gradients of scales instead."""
        import triton

        from auto_round.tuning.triton_float_step import float_step_kernel

        tuned = self.tuned if gradient is None else self.tuned.reached_by(gradient)
        element, width = element_of(tuned.scheme), self.weight.shape[1]
        wide = triton.next_power_of_2(self.run)
        rows = PROGRAM_ELEMENTS // wide
        count = self.weight.shape[0] * self.runs
        outputs, inputs = (tuned.curvature.outputs, tuned.curvature.inputs) if tuned.curvature else (None, None)
        options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
        float_step_kernel[(math.ceil(count / rows),)](
            self.weight, gradient, tuned.params["rounding"], self.scale, outputs, inputs, decay, by_scale,
            self.dequantized, count, self.runs, width, self.group, self.groups, tuned.part_rows, unit, rounding_size,
            tuned.reach, CURVATURE_SHARE, LARGEST=element.largest, FRACTION_BITS=element.fraction_bits,
            MIN_EXPONENT=element.min_exponent, MAX_EXPONENT=element.max_exponent,
            COUNTS_SCALES=element.offsets_count_scales, K=self.run, WIDE=wide, ROWS=rows, **options,
        )  # fmt: skip


FUSED_WEIGHTS.register(*(name for name, kind in DATA_TYPES.items() if isinstance(kind, FloatDataType)))(FusedFloat)
