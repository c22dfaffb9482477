"""The kernel of a step in Triton's interpreter, against `TunedWeight`, which takes the same step with autograd.

The tests proper are collected only in the process that the one test outside of it starts.
"""

import os

import pytest
import torch
from autograd_step import step_with_autograd

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.fused_int import FusedInt
from auto_round.tuning.tuned_weight import Curvature, TunedWeight

pytest.importorskip("triton")
from triton import language as tl

from auto_round.tuning.triton_step import step_kernel

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# (bits, group size, symmetric, scale dtype, weight dtype, (out, in)). Groups of no power of two, whole rows, programs
# that are not full. No bfloat16 scales: the interpreter truncates where a GPU rounds.
CASES = [
    (4, 128, True, "float16", torch.bfloat16, (9, 256)),
    (2, 32, True, "float16", torch.float32, (7, 96)),
    (2, 64, False, "float16", torch.bfloat16, (5, 192)),
    (3, 48, False, "float16", torch.float32, (6, 144)),
    (4, -1, False, "float32", torch.float16, (8, 200)),
    (8, -1, True, "float16", torch.float32, (4, 300)),
]


def make_weight(bits, group_size, sym, scale_dtype, dtype, shape, curved, parts=1):
    scheme = QuantizationScheme(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype)
    rng = torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=rng).to(dtype)
    weight[1] = 0  # scales at their smallest
    weight[2] = weight[2].abs()  # zero points at an end
    data_type = DATA_TYPES["int"]
    params = data_type.trainable(weight, scheme)
    params["rounding"].uniform_(-0.4, 0.4, generator=rng)
    for name in params.keys() - {"rounding"}:
        params[name].uniform_(0.6, 1.4, generator=rng)
    inputs = (shape[1],) if parts == 1 else (parts, shape[1])
    curvature = Curvature(torch.rand(shape[0], generator=rng), torch.rand(inputs, generator=rng)) if curved else None
    range_ = data_type.minmax_range(weight, scheme)
    return TunedWeight(weight, scheme, data_type, range_, params, curvature, 0.5, parts)


if IS_INTERPRETED:

    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("curved", [False, True], ids=["plain", "curved"])
    def test_steps_are_those_of_autograd(case, curved):
        mine, other = make_weight(*case, curved), make_weight(*case, curved)
        fused = FusedInt(mine, torch.float32)
        assert torch.equal(fused.dequantized, other.dequantized())
        rng = torch.Generator().manual_seed(1)
        for decay in (1.0, 0.7, 0.3):
            gradient = torch.randn(mine.weight.shape, generator=rng)
            before = {name: tensor.clone() for name, tensor in mine.params.items()}
            fused.move(gradient, torch.tensor(decay), 0.13, 0.05)
            step_with_autograd(other, gradient, decay, 0.13, 0.05)
            for name, tensor in mine.params.items():
                torch.testing.assert_close(tensor, other.params[name], rtol=0, atol=1e-6, msg=name)
                assert not torch.equal(tensor, before[name]), name
            torch.testing.assert_close(fused.dequantized, other.dequantized(), rtol=0, atol=1e-5)
            # What is stored in the end is what the block ran with.
            assert torch.equal(fused.dequantized, mine.encoded().dequantize())

    def test_parts_of_a_weight_have_each_its_own_curvature_and_stay_without_a_gradient():
        mine, other = (make_weight(*CASES[2][:-1], (6, 192), curved=True, parts=3) for _ in range(2))
        before = mine.params["rounding"].clone()
        gradient = torch.randn(6, 192, generator=torch.Generator().manual_seed(1)) * 1e-2
        gradient[2:4] = 0
        FusedInt(mine, torch.float32).move(gradient, torch.tensor(1.0), 0.13, 0.05)
        step_with_autograd(other.reached_by(gradient), gradient, 1.0, 0.13, 0.05)
        for name, tensor in mine.params.items():
            torch.testing.assert_close(tensor, other.params[name], rtol=0, atol=1e-6, msg=name)
        same = (mine.params["rounding"] == before).flatten(1).all(1)
        assert same.tolist() == [False, False, True, True, False, False]

    def test_parameters_without_a_gradient_stay():
        tuned = make_weight(*CASES[0], False)
        before = {name: tensor.clone() for name, tensor in tuned.params.items()}
        FusedInt(tuned, torch.float32).move(torch.zeros(tuned.weight.shape), torch.tensor(1.0), 0.1, 0.1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.params.items())

else:

    def test_the_kernel_is_right_in_the_interpreter(run_interpreted):
        assert run_interpreted(__file__) == 2 * len(CASES) + 2

    @pytest.mark.parametrize("is_curved", [False, True], ids=["plain", "curved"])
    @pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
    def test_it_compiles_for_a_gpu_without_fused_multiplications(sym, is_curved, ptx_for_hopper):
        floats = ("rounding", "first", "second", "max_scale", "min_scale", "outputs", "inputs", "decay")
        ptx = ptx_for_hopper(
            step_kernel,
            dict.fromkeys(("weight", "gradient", "dequantized"), "*bf16")
            | dict.fromkeys(floats, "*fp32")
            | dict.fromkeys(("count", "groups", "part_rows"), "i32")
            | dict.fromkeys(("unit", "rounding_size", "clip_size", "reach", "share", "least"), "fp32"),
            {"BITS": 4, "SYM": sym, "MOVES": True, "CURVED": is_curved, "SCALE": tl.float16}
            | {"LOW": 0.5, "HIGH": 1.5, "K": 128, "WIDE": 128, "ROWS": 16},
        )
        assert "div.rn.f32" in ptx
        assert "fma" not in ptx
