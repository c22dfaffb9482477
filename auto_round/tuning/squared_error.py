"""Sum of squared differences and its gradient: on an NVIDIA GPU in one pass, elsewhere as PyTorch computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auto_round.device import runs_triton

PROGRAM_ELEMENTS = 4096


def squared_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns () float32: sum of (output - target)^2, times `weight`, which is broadcast, if there is one.

    Differences and sums are taken in float32; the gradient by `output` is rounded to its precision.
    """
    if weight is None and _has_kernel(output, target):
        return _OnePass.apply(output, target)
    error = (output.float() - target.float()).square()
    return (error if weight is None else error * weight).sum()


def _has_kernel(output: Tensor, target: Tensor) -> bool:
    return output.shape == target.shape and not torch.compiler.is_compiling() and runs_triton(output)


class _OnePass(torch.autograd.Function):
    """Keeps the gradient instead of the difference."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        from auto_round.tuning.triton_error import error_kernel

        output, target = output.contiguous(), target.contiguous()
        gradient = torch.empty_like(output)
        programs = -(-output.numel() // PROGRAM_ELEMENTS)
        sums = output.new_empty(programs, dtype=torch.float32)
        error_kernel[(programs,)](output, target, gradient, sums, output.numel(), SIZE=PROGRAM_ELEMENTS, num_warps=8)
        ctx.save_for_backward(gradient)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None
