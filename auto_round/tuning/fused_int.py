"""Tuning steps of integer weights by `triton_step`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from auto_round.data_types.base import MIN_SCALE
from auto_round.tuning.fused_step import FUSED_WEIGHTS, PROGRAM_ELEMENTS
from auto_round.tuning.tuned_weight import CLIP_BOUNDS, CURVATURE_SHARE, TunedWeight

# Longer groups (whole rows) would not stay in the registers of a program.
MAX_GROUP = 16384


@FUSED_WEIGHTS.register("int")
class FusedInt:
    """The steps of one integer weight: groups along a row, all of one length."""

    def __init__(self, tuned: TunedWeight, dtype: torch.dtype) -> None:
        self.tuned = tuned
        self.weight = tuned.weight.contiguous()
        self.dequantized = torch.empty_like(self.weight, dtype=dtype)
        scheme = tuned.scheme
        rows, width = self.weight.shape
        self.group = width if scheme.group_size == -1 else int(scheme.group_size)  # type: ignore[arg-type]
        self.groups = width // self.group
        self.count = rows * self.groups
        names = ("scale",) if scheme.sym else ("low", "high")
        ends = [tuned.range_[name].contiguous() for name in names]
        self.ends = (ends[0], ends[-1])
        self.none = torch.zeros((), device=self.weight.device)
        self._launch(self.weight, self.none, 1.0, 0.0, 0.0, moves=False)

    @staticmethod
    def fits(tuned: TunedWeight) -> bool:
        """Returns whether a program holds a group, and groups fill rows."""
        width = tuned.weight.shape[1]
        group = width if tuned.scheme.group_size == -1 else tuned.scheme.group_size
        return isinstance(group, int) and 0 < group <= MAX_GROUP and width % group == 0

    def move(
        self, gradient_OI: Tensor, decay: Tensor, rounding_size: float, clip_size: float, unit: float = 1.0
    ) -> None:
        """Moves offsets and clip factors, in one pass."""
        self._launch(gradient_OI.contiguous(), decay, unit, rounding_size, clip_size, moves=True)

    def _launch(
        self, gradient: Tensor, decay: Tensor, unit: float, rounding_size: float, clip_size: float, *, moves: bool
    ) -> None:
        import triton
        from triton import language as tl

        from auto_round.tuning.triton_step import step_kernel

        tuned = self.tuned.reached_by(gradient) if moves else self.tuned
        scheme, curvature = tuned.scheme, tuned.curvature
        wide = triton.next_power_of_2(self.group)
        rows = max(1, PROGRAM_ELEMENTS // wide)
        clip = tuned.params["max_scale"]
        options: dict[str, Any] = {"num_warps": 4 if wide <= 4096 else 8, "enable_fp_fusion": False}
        outputs, inputs = (self.none, self.none) if curvature is None else (curvature.outputs, curvature.inputs)
        sizes = (self.count, self.groups, tuned.part_rows, unit, rounding_size, clip_size, tuned.reach, CURVATURE_SHARE)
        step_kernel[(math.ceil(self.count / rows),)](
            self.weight, gradient, tuned.params["rounding"], *self.ends, clip, tuned.params.get("min_scale", clip),
            outputs, inputs, decay, self.dequantized, *sizes, MIN_SCALE[scheme.scale_dtype],
            BITS=scheme.bits, SYM=scheme.sym, MOVES=moves, CURVED=curvature is not None,
            SCALE=getattr(tl, scheme.scale_dtype), LOW=CLIP_BOUNDS[0], HIGH=CLIP_BOUNDS[1],
            K=self.group, WIDE=wide, ROWS=rows, **options,
        )  # fmt: skip
