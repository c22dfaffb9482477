"""Triton kernel of one tuning step for integer weights, and what it shares with `triton_float_step`.

One program takes some groups of a weight. It reads the gradient of the dequantized weights once, takes the gradients
of the group's parameters as autograd takes them from `IntDataType.fake_quantize`, moves the parameters by their signs,
and writes the dequantized weights of the next step. Nothing between is stored.

Letters: N groups of the whole weight, K weights of a group, O out features, G groups of a row, P parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

# x + 1.5 * 2**23 - 1.5 * 2**23 rounds to the nearest integer, ties to even, below 2**22.
ROUNDING = tl.constexpr(12582912.0)


@triton.constexpr_function
def _largest(dtype: tl.dtype) -> float:
    return 65504.0 if dtype == tl.float16 else 3.3895313892515355e38


@triton.jit
def nearest_integer(x):
    """Returns the nearest integer, ties to even, as float32."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def moved(parameter, gradient, size, low, high):
    """Returns a parameter one signed step further, kept between two bounds."""
    further = parameter - tl.where(gradient > 0, size, tl.where(gradient < 0, -size, 0.0))
    return tl.minimum(tl.maximum(further, low), high)


@triton.jit
def pull(outputs, inputs, row, column, unit, share, is_row, inside):
    """Returns (N, K): what the curvature multiplies distances from a level with, in units of `unit`, (N, 1 or K).

    outputs, inputs: the curvature's factors, read at `row` (N,) and `column` (N, K). share: how much of it is believed.
    """
    out = tl.load(outputs + row, mask=is_row, other=0.0)
    return share * unit * unit * out[:, None] * tl.load(inputs + column, mask=inside, other=0.0)


@triton.jit
def _held(x, SCALE: tl.constexpr):
    """Returns float32 values rounded to what a scale's dtype holds, the largest finite one at most."""
    if SCALE == tl.float32:
        return x
    limit: tl.constexpr = _largest(SCALE)
    return tl.minimum(tl.maximum(x, -limit), limit).to(SCALE).to(tl.float32)


@triton.jit
def _grid(first, second, low_factor, high_factor, least, BITS: tl.constexpr, SYM: tl.constexpr, SCALE: tl.constexpr):
    """Returns scale and zero point, and whether each is at no end of its range, so that gradients pass."""
    TOP: tl.constexpr = 2.0**BITS - 1.0
    if SYM:
        held = _held(first * high_factor, SCALE)
        passes = tl.abs(held) >= least
        scale = tl.where(passes, held, tl.where(held < 0, -least, least))
        return scale, tl.full(scale.shape, 2.0 ** (BITS - 1), tl.float32), passes, passes
    else:
        low = first * low_factor
        held = _held(tl.math.div_rn(second * high_factor - low, TOP), SCALE)
        scale = tl.maximum(held, least)
        exact = nearest_integer(tl.math.div_rn(-low, scale))
        zero = tl.minimum(tl.maximum(exact, 1.0), TOP)
        return scale, zero, held >= least, (exact >= 1.0) & (exact <= TOP)


@triton.jit
def _rounding_gradient(g, ratio, v, scale, zero, pulled, TOP: tl.constexpr):
    """Returns the gradient of the offsets, the level of each weight, and whether it is at no end of the grid.

    `pulled` (N, K) is what the curvature multiplies the distance from the level with; 0 without it.
    """
    latent = ratio + v
    rounded = nearest_integer(latent)
    code = rounded + zero[:, None]
    is_free = (code >= 0.0) & (code <= TOP)
    level = tl.minimum(tl.maximum(code, 0.0), TOP) - zero[:, None]
    return tl.where(is_free, g * scale[:, None] + pulled * (latent - rounded), 0.0), level, is_free


@triton.jit
def _moved_ends(
    first, second, low_factor, high_factor, scale, by_scale, by_zero, scale_moves, zero_moves, size,
    TOP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Returns both clip factors of an asymmetric range one step further.

    scale = (second high_factor - first low_factor) / TOP and zero point = -first low_factor / scale.
    """
    by_zero = tl.where(zero_moves, by_zero, 0.0)
    by_scale = tl.where(scale_moves, by_scale + by_zero * first * low_factor / (scale * scale), 0.0)
    high = moved(high_factor, second * by_scale, size, LOW, HIGH)
    low = moved(low_factor, -first * (by_scale / TOP + by_zero / scale), size, LOW, HIGH)
    return low, high


@triton.jit
def step_kernel(
    weight, gradient, rounding, first, second, max_scale, min_scale, outputs, inputs, decay, dequantized,
    count, groups, part_rows, unit, rounding_size, clip_size, reach, share, least,
    BITS: tl.constexpr, SYM: tl.constexpr, MOVES: tl.constexpr, CURVED: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Moves the parameters of a weight in place and writes what it stands for then.

    Args:
        weight, gradient, rounding, dequantized: (N, K). gradient is not read unless MOVES.
        first, second: the range, (N,) float32: scales, twice, or low and high ends.
        max_scale, min_scale: (N,) float32; min_scale is not read where SYM.
        outputs, inputs: (O,), (P, I) float32, the curvature's factors, read where CURVED. P parts have part_rows each.
        unit: what gradients are multiplied with. decay: () float32, what both step sizes are multiplied with.
        share: of the curvature that is believed. least: smallest magnitude of a scale. WIDE: K or the next power of 2.
    """
    TOP: tl.constexpr = 2.0**BITS - 1.0
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDE)
    is_group = n < count
    inside = is_group[:, None] & (k < K)[None, :]
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(rounding + place, mask=inside, other=0.0)
    start = tl.load(first + n, mask=is_group, other=1.0)
    end = tl.load(second + n, mask=is_group, other=1.0)
    upper = tl.load(max_scale + n, mask=is_group, other=1.0)
    lower = upper if SYM else tl.load(min_scale + n, mask=is_group, other=1.0)
    scale, zero, scale_moves, zero_moves = _grid(start, end, lower, upper, least, BITS, SYM, SCALE)
    if MOVES:
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * unit
        ratio = tl.math.div_rn(w, scale[:, None])
        if CURVED:
            row = n // groups
            column = (row // part_rows * groups + n % groups)[:, None] * K + k[None, :]
            pulled = pull(outputs, inputs, row, column, scale[:, None], share, is_group, inside)
        else:
            pulled = tl.zeros_like(ratio)
        by_rounding, level, is_free = _rounding_gradient(g, ratio, v, scale, zero, pulled, TOP)
        by_scale = tl.sum(g * (level - tl.where(is_free, ratio, 0.0)), 1)
        factor = tl.load(decay)
        if SYM:
            by_factor = tl.where(scale_moves, by_scale * start, 0.0)
            upper = moved(upper, by_factor, factor * clip_size, LOW, HIGH)
        else:
            by_zero = -scale * tl.sum(tl.where(is_free, 0.0, g), 1)
            lower, upper = _moved_ends(
                start, end, lower, upper, scale, by_scale, by_zero, scale_moves, zero_moves, factor * clip_size,
                TOP, LOW, HIGH,
            )  # fmt: skip
            tl.store(min_scale + n, lower, mask=is_group)
        v = moved(v, by_rounding, factor * rounding_size, -reach, reach)
        tl.store(rounding + place, v, mask=inside)
        tl.store(max_scale + n, upper, mask=is_group)
        scale, zero, scale_moves, zero_moves = _grid(start, end, lower, upper, least, BITS, SYM, SCALE)
    code = nearest_integer(tl.math.div_rn(w, scale[:, None]) + v) + zero[:, None]
    level = tl.minimum(tl.maximum(code, 0.0), TOP) - zero[:, None]
    tl.store(dequantized + place, (scale[:, None] * level).to(dequantized.dtype.element_ty), mask=inside)
