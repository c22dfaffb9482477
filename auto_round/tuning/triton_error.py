"""Triton kernel of `squared_error`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def error_kernel(output, target, gradient, sums, count, SIZE: tl.constexpr):
    """Writes the gradient 2 (output - target), and for each program the sum of its squared differences, float32."""
    program = tl.program_id(0).to(tl.int64)
    n = program * SIZE + tl.arange(0, SIZE)
    inside = n < count
    difference = tl.load(output + n, mask=inside, other=0.0).to(tl.float32)
    difference -= tl.load(target + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(gradient + n, (2 * difference).to(gradient.dtype.element_ty), mask=inside)
    tl.store(sums + program, tl.sum(difference * difference, 0))
