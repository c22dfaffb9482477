"""The Triton kernels in Triton's interpreter, which runs them on a CPU.

The tests proper are collected only in the process that the one test outside of it starts. The interpreter runs no
assembly: that is compared by the shared tests of the backends, on a GPU.
"""

import os

import pytest
import torch

from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme

pytest.importorskip("triton")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16 = torch.bfloat16, torch.float16
# (bits, group size, symmetric, layout, dtype, (out, in), tokens). Groups longer than, as long as and shorter than a
# slice; of no power of two; one for a row. Rows that fill no tile, inputs that fill no step.
CASES = [
    (4, 128, True, "gptq", BF16, (40, 384), 3),
    (4, 64, False, "gptq", FP16, (16, 128), 9),
    (4, 32, False, "gptq_zp", BF16, (24, 160), 1),
    (4, 48, False, "gptq", FP16, (16, 288), 2),
    (4, -1, True, "gptq", BF16, (43, 96), 2),
    (4, 32, False, "awq", FP16, (40, 160), 3),
    (4, 128, True, "awq", BF16, (12, 256), 2),
    (2, 64, False, "gptq", BF16, (24, 192), 3),
    (2, 32, True, "gptq_zp", FP16, (16, 96), 2),
    (3, 32, False, "gptq", BF16, (24, 96), 3),
    (3, -1, True, "gptq", FP16, (16, 640), 2),
    (8, 32, False, "gptq", BF16, (24, 96), 3),
    (8, 128, True, "gptq", FP16, (16, 256), 2),
]

if IS_INTERPRETED:
    from auto_round.inference.triton_ops import Packing, Tile, dequantize, grid_table, multiply
    from auto_round.tensors import QuantizedTensor, group_count

    def random_weight(bits, group_size, sym, shape):
        scheme = QuantizationScheme(bits=bits, group_size=group_size, sym=sym)
        rng = torch.Generator().manual_seed(0)
        groups = (shape[0], group_count(shape[1], group_size))
        codes = torch.randint(0, 2**bits, shape, generator=rng, dtype=torch.uint8)
        scale = (torch.randn(groups, generator=rng) * 0.1 / 2**bits).half().float()
        zero = None if sym else torch.randint(1, 2**bits, groups, generator=rng, dtype=torch.uint8)
        return QuantizedTensor(codes, scale, zero, scheme)

    def packed(weight, layout):
        tensors = LAYOUTS[layout].pack(weight)
        width = weight.shape[1]
        group = width if weight.scheme.group_size == -1 else weight.scheme.group_size
        packing = Packing(weight.scheme.bits, group, layout == "awq", FP16)
        qweight = tensors["qweight"].t().contiguous().t()
        return qweight, grid_table(tensors["scales"], weight.zero_point, packing), packing

    @pytest.mark.parametrize(("bits", "group_size", "sym", "layout", "dtype", "shape", "tokens"), CASES)
    @pytest.mark.parametrize("tile", [Tile(16, 8, 2, 64, 3), Tile(32, 16, 1, 128, 2)], ids=["two slices", "one"])
    def test_products_are_those_of_the_dequantized_weight(bits, group_size, sym, layout, dtype, shape, tokens, tile):
        weight = random_weight(bits, group_size, sym, shape)
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        qweight, grid, packing = packed(weight, layout)
        tile = tile._replace(columns=512) if bits == 3 else tile
        y = multiply(x, qweight, grid, bias, packing, tile)
        exact = x.double() @ weight.dequantize().double().t() + bias.double()
        assert (y.shape, y.dtype) == (exact.shape, dtype)
        # The interpreter sums in float32 and truncates to bfloat16 (2**-7), rounds to float16 (2**-11).
        torch.testing.assert_close(y.double(), exact, rtol=2**-7 if dtype == BF16 else 2**-10, atol=2e-3)

    @pytest.mark.parametrize(("bits", "group_size", "sym", "layout", "dtype", "shape", "tokens"), CASES)
    def test_dequantized_weights_are_exact(bits, group_size, sym, layout, dtype, shape, tokens):
        weight = random_weight(bits, group_size, sym, shape)
        qweight, grid, packing = packed(weight, layout)
        # In float16, because the interpreter truncates where a GPU rounds to bfloat16.
        assert torch.equal(dequantize(qweight, grid, packing, shape[1], FP16), weight.dequantize().half())

else:

    def test_the_kernels_are_right_in_the_interpreter(run_interpreted):
        assert run_interpreted(__file__) == 3 * len(CASES)
