"""Triton kernel of one tuning step for weights with float or fixed-point elements: MX, NVFP4, FP8.

One program takes some runs of weights, each under one scale. It reads weights, gradients and offsets once, takes the
gradient of the offsets as autograd takes it from `data_types.float_grid.fake_quantize`, moves them by its sign, and
writes the dequantized weights of the next step. How scales are chosen and stored is not known here: they are read.

An element format is four numbers: around x its numbers are 2**(exponent of x - FRACTION_BITS) apart, the exponent kept
between MIN_EXPONENT and MAX_EXPONENT, and the largest is LARGEST. Fixed point has one exponent.

Letters: N runs of the whole weight, K weights of a run, O out features, I in features, G groups of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from auto_round.tuning.triton_step import moved, nearest_integer, pull


@triton.jit
def power_of_two(exponent):
    """Returns 2**exponent, exactly, for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def spacing_exponent(x, FRACTION_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr):
    """Returns the int32 exponent of the distance between neighbouring numbers of an element around x."""
    exponent = (tl.abs(x).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(exponent, MIN_EXPONENT), MAX_EXPONENT) - FRACTION_BITS


@triton.jit
def to_element(
    x, LARGEST: tl.constexpr, FRACTION_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr
):
    """Returns the nearest number of an element, ties to even, the largest one at most."""
    held = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    step = spacing_exponent(held, FRACTION_BITS, MIN_EXPONENT, MAX_EXPONENT)
    return nearest_integer(held * power_of_two(-step)) * power_of_two(step)


@triton.jit
def float_step_kernel(
    weight, gradient, rounding, scale, outputs, inputs, decay, by_scale, dequantized,
    count, runs, width, group, groups, part_rows, unit, rounding_size, reach, share,
    LARGEST: tl.constexpr, FRACTION_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr,
    COUNTS_SCALES: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Moves the offsets of a weight in place and writes what it stands for then, or the gradients of its scales.

    Args:
        weight, dequantized: (O, I). dequantized is written unless there is by_scale.
        gradient: (O, I), of the dequantized weights; None: offsets stay.
        rounding: (O, G, group), in units of the scale where COUNTS_SCALES, else of the distance between numbers.
        scale: (O, G) float32, what numbers of the element are multiplied by.
        outputs, inputs: (O,), (P, I) float32, the curvature's factors, or None. P parts have part_rows each.
        by_scale: (N,) float32, where the gradients of scales go, of each run by itself, or None.
        count, runs: of the weight and of a row; the last run of a row may be shorter. width: I.
        unit: what gradients are multiplied with. decay: () float32, what the step size is multiplied with.
        share: of the curvature that is believed. WIDE: K or the next power of 2.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDE)[None, :]
    is_run = n < count
    row, start = n // runs, (n % runs) * K
    column = start[:, None] + k
    inside = is_run[:, None] & (k < K) & (column < width)
    long_row = row.to(tl.int64)
    place = long_row[:, None] * width + column
    offset_place = long_row[:, None] * (groups * group) + column
    s = tl.load(scale + long_row * groups + start // group, mask=is_run, other=1.0)[:, None]
    ratio = tl.math.div_rn(tl.load(weight + place, mask=inside, other=0.0).to(tl.float32), s)
    v = tl.load(rounding + offset_place, mask=inside, other=0.0)
    if COUNTS_SCALES:
        exponent = tl.zeros_like(ratio).to(tl.int32)
    else:
        exponent = spacing_exponent(ratio, FRACTION_BITS, MIN_EXPONENT, MAX_EXPONENT)
    offset_unit = power_of_two(exponent)
    if gradient is not None:
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * unit
        latent = ratio + v * offset_unit
        level = to_element(latent, LARGEST, FRACTION_BITS, MIN_EXPONENT, MAX_EXPONENT)
        is_free = tl.abs(latent) <= LARGEST
        by_rounding = g * s * offset_unit
        if outputs is not None:
            of_part = (row // part_rows * width)[:, None] + column
            pulled = pull(outputs, inputs, row, of_part, s * offset_unit, share, is_run, inside)
            by_rounding += pulled * ((latent - level) * power_of_two(-exponent))
        by_rounding = tl.where(is_free, by_rounding, 0.0)
        v = moved(v, by_rounding, tl.load(decay) * rounding_size, -reach, reach)
        tl.store(rounding + offset_place, v, mask=inside)
        if by_scale is not None:
            tl.store(by_scale + n, tl.sum(g * (level - tl.where(is_free, ratio, 0.0)), 1), mask=is_run)
    if by_scale is None:
        level = to_element(ratio + v * offset_unit, LARGEST, FRACTION_BITS, MIN_EXPONENT, MAX_EXPONENT)
        tl.store(dequantized + place, (s * level).to(dequantized.dtype.element_ty), mask=inside)
