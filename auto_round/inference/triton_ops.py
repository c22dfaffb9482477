"""The Triton kernels as a PyTorch operator, `torch.ops.auto_round.packed_linear`.

Being an operator with a shape function, it can be compiled around and captured in CUDA graphs. How many tokens there
are is looked at inside, so that a change of it recompiles nothing.

Shape letters: O out features, I in features, G groups, T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from auto_round.inference.bit_unpack import AWQ_SHIFTS
from auto_round.inference.triton_kernels import dequantize_kernel, multiply_kernel

# Whether TRITON_INTERPRET=1 was set when Triton was imported: then kernels run on CPUs, slowly, for tests.
INTERPRETED = bool(triton.knobs.runtime.interpret)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Packing(NamedTuple):
    """How a weight is packed.

    Attributes:
        group: weights that share a scale, a multiple of 16 (32 for 3 bits) that divides the width.
        awq: AWQ's layout, else GPTQ's.
        scale: dtype of the scales in the grid.
    """

    bits: int
    group: int
    awq: bool
    scale: torch.dtype


class Tile(NamedTuple):
    """What one program of `multiply_kernel` computes, and how.

    Attributes:
        rows, tokens: of the result.
        slices: warps that share the input, each with `columns` of it at a time.
        stages: how many steps' words are loaded ahead, plus one.
    """

    rows: int
    tokens: int
    slices: int
    columns: int
    stages: int


# Above this many tokens the weight is dequantized for PyTorch's matrix product. Measured on an H200, 4 bits in groups
# of 128: for 64 tokens 17 us against 21 us (4096 x 4096) and 51 us against 79 us (14336 x 4096), for 128 tokens 34 us
# against 26 us and 109 us against 78 us.
MAX_TOKENS = 64
# The units of 3 bits are 32 codes, so their tiles are wide and hold fewer tokens.
MAX_TOKENS_OF_3_BITS = 16
# Rows and columns of a program of `dequantize_kernel`.
DEQUANTIZE_TILE = (8, 512)
# From this many rows on, programs of 64 rows are enough for all of an H200's 132 multiprocessors.
TALL = 8192


def tile_for(tokens: int, out_features: int, packing: Packing) -> Tile | None:
    """Returns the tile for some tokens, or None if the weight is to be dequantized.

    Chosen on an H200: for 4 bits in groups of 128 from 19 tiles (up to 8 tokens), 9 (up to 16) and 4 (more), for other
    widths from two or three. All fit the 99 KB of shared memory of GPUs of compute capability 8.6 and 8.9.
    """
    if packing.bits == 3:
        return Tile(16, 8 if tokens <= 8 else 16, 4, 512, 2) if tokens <= MAX_TOKENS_OF_3_BITS else None
    if tokens > MAX_TOKENS:
        return None
    if tokens > 16:
        return Tile(32, 32, 4, 64, 4)
    width = 8 if tokens <= 8 else 16
    if packing.bits == 4 and out_features >= TALL and width == 16:
        return Tile(64, width, 4, 128, 3)
    return Tile(32, width, 4, 128, 4 if width == 8 and packing.bits < 8 else 3)


def packed_linear(
    x: Tensor, qweight: Tensor, grid: Tensor, bias: Tensor | None, bits: int, group: int, awq: bool, scale: torch.dtype
) -> Tensor:
    """Returns (..., O) = x W^T + bias in x's dtype.

    Args:
        x: (..., I) float16 or bfloat16.
        qweight: of the layout GPTQ (I * bits / 32, O) or AWQ (I, O / 8), int32, stored row by row of W.
        grid: (G, O) int32, see `grid_table`.
        bits, group, awq, scale: see `Packing`.
    """
    packing = Packing(bits, group, awq, scale)
    *leading, width = x.shape
    tokens = math.prod(leading)
    if tokens == 0:
        return x.new_empty(*leading, grid.shape[1])
    tile = tile_for(tokens, grid.shape[1], packing)
    if tile is None:
        return F.linear(x, dequantize(qweight, grid, packing, width, x.dtype), bias)
    return multiply(x, qweight, grid, bias, packing, tile)


def _shape(x: Tensor, qweight: Tensor, grid: Tensor, *packing: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], grid.shape[1])


# Defined by hand: calling an operator made by `custom_op` takes 6 us longer, as long as a small product.
_LIBRARY = torch.library.Library("auto_round", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor qweight, Tensor grid, Tensor? bias, int bits, int group, bool awq,"
    " ScalarType scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.impl("packed_linear", packed_linear, "CPU" if INTERPRETED else "CUDA")
torch.library.register_fake("auto_round::packed_linear", _shape, lib=_LIBRARY)


def multiply(x: Tensor, qweight: Tensor, grid: Tensor, bias: Tensor | None, packing: Packing, tile: Tile) -> Tensor:
    """Returns (..., O) = x W^T + bias for x (..., I), with the weight unpacked in registers."""
    *leading, width = x.shape
    tokens = math.prod(leading)
    groups, out_features = grid.shape
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # four activations are loaded as one number, whose address must be a multiple of its size
    y = x.new_empty(*leading, out_features)
    words = _row_by_row(qweight)
    sizes = (width, out_features, words.shape[0], groups)
    launch = _multiplication(packing, tile, x.dtype, x.device, sizes, bias is None)
    launch((-(-out_features // tile.rows), -(-tokens // tile.tokens), 1), (x, words, grid, bias, y), (tokens, *sizes))
    return y


def dequantize(qweight: Tensor, grid: Tensor, packing: Packing, width: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight (O, I): scale * (code - zero point), computed in float32 and rounded once to `dtype`."""
    out_features = grid.shape[1]
    weight = grid.new_empty(out_features, width, dtype=dtype)
    words = _row_by_row(qweight)
    sizes = (width, out_features, words.shape[0])
    rows, columns = DEQUANTIZE_TILE
    launch = _dequantization(packing, dtype, grid.device, sizes)
    launch((-(-out_features // rows), -(-width // columns), 1), (words, grid, weight), sizes)
    return weight


def grid_table(scale_GO: Tensor, zero_OG: Tensor | None, packing: Packing) -> Tensor:
    """Returns the (G, O) int32 table the kernels read: scale bits, zero points << 16, AWQ's bit positions << 24.

    Args:
        scale_GO: (G, O), rounded to `packing.scale`.
        zero_OG: (O, G) uint8; None for a symmetric weight, whose zero point is the middle of the grid.
    """
    table_GO = scale_GO.to(packing.scale).contiguous().view(torch.int16).int() & 0xFFFF
    table_GO |= (2 ** (packing.bits - 1) << 16) if zero_OG is None else zero_OG.t().int() << 16
    if packing.awq:
        positions = torch.tensor(AWQ_SHIFTS, dtype=torch.int32, device=table_GO.device)
        table_GO |= positions[torch.arange(table_GO.shape[1], device=table_GO.device) % 8] << 24
    return table_GO


def _row_by_row(qweight: Tensor) -> Tensor:
    """Returns `qweight` with its transpose contiguous, which is how settled layers have it."""
    return qweight if qweight.stride() == (1, qweight.shape[0]) else qweight.t().contiguous().t()


class _Launch:
    """Runs one kernel with one set of sizes and constants.

    The kernel that the first call compiles is kept and called past Triton's inspection of every argument, which takes
    longer than a small product. It may look at alignment, so calls with other alignment are not cut short.
    """

    def __init__(self, kernel: Any, device: torch.device, constants: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.device, self.constants, self.options = kernel, device, constants, options
        self.compiled: Callable[..., Any] | None = None

    def __call__(
        self, programs: tuple[int, int, int], tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]
    ) -> None:
        arguments = (*tensors, *sizes, *self.constants)
        if INTERPRETED:
            self.kernel[programs](*arguments)
        elif torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._run(programs, tensors, arguments)
        else:
            self._run(programs, tensors, arguments)

    def _run(
        self, programs: tuple[int, int, int], tensors: tuple[Tensor | None, ...], arguments: tuple[Any, ...]
    ) -> None:
        addresses = 0
        for tensor in tensors:
            addresses |= 0 if tensor is None else tensor.data_ptr()
        if addresses % 16:
            self.kernel[programs](*arguments, **self.options)
        elif self.compiled is None:
            self.compiled = self.kernel[programs](*arguments, **self.options)
        else:
            self.compiled[programs](*arguments)


@functools.cache
def _multiplication(
    packing: Packing,
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, ...],
    no_bias: bool,  # noqa: ARG001  (without a bias it is another kernel)
) -> _Launch:
    unit = math.gcd(packing.group, tile.columns)
    kind = (packing.bits, packing.awq, packing.group, unit, tile.columns)
    shape = (tile.slices, tile.rows, tile.tokens, tile.stages)
    is_even = sizes[0] % (tile.slices * tile.columns) == 0
    is_full = sizes[1] % tile.rows == 0
    compute = tl.float32 if INTERPRETED else TYPES[dtype]
    constants = (*kind, *shape, is_even, is_full, TYPES[packing.scale], compute)
    return _Launch(multiply_kernel, device, constants, num_warps=tile.slices)


@functools.cache
def _dequantization(
    packing: Packing,
    dtype: torch.dtype,  # noqa: ARG001  (for another dtype it is another kernel)
    device: torch.device,
    sizes: tuple[int, ...],  # noqa: ARG001  (Triton looks at what divides them)
) -> _Launch:
    rows, columns = DEQUANTIZE_TILE
    unit = math.gcd(packing.group, columns)
    constants = (packing.bits, packing.awq, packing.group, unit, rows, columns, TYPES[packing.scale])
    return _Launch(dequantize_kernel, device, constants, num_warps=4)
