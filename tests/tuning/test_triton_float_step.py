"""The kernel of a step in Triton's interpreter, against `TunedWeight`, which takes the same step with autograd.

Everything is compared exactly: the kernel does the same float32 operations in the same order. The one exception is the
order of sums over a group, which clip factors move by; only their signs count, and no sum here is within rounding of 0.
"""

import os

import pytest
import torch
from autograd_step import step_with_autograd

from auto_round.data_types import DATA_TYPES
from auto_round.elements import ELEMENTS
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tuning.fused_float import LONGEST_RUN, FusedFloat
from auto_round.tuning.fused_step import PROGRAM_ELEMENTS
from auto_round.tuning.tuned_weight import Curvature, TunedWeight

pytest.importorskip("triton")
import triton
from triton import language as tl

from auto_round.tuning.triton_float_step import float_step_kernel, to_element

KINDS = list(dict.fromkeys(ELEMENTS.values()))
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
E3M2, E5M2 = (
    QuantizationScheme.from_dict({"data_type": name, "bits": bits})
    for name, bits in (("mx_fp_e3m2", 6), ("mx_fp_e5m2", 8))
)
FP8 = PRESET_SCHEMES["FPW8A16"]
# Scheme, dtype of the weight, dtype of the block, (out, in). Rows that groups do not fill, programs that are not full.
# No block in bfloat16, which the interpreter truncates to, and without subnormal numbers; a GPU rounds to all of it.
CASES = {
    "mxfp4": (PRESET_SCHEMES["MXFP4"], torch.bfloat16, torch.float32, (70, 96)),
    "mxfp4-short-groups": (PRESET_SCHEMES["MXFP4"], torch.float32, torch.float16, (7, 75)),
    "mxfp6": (PRESET_SCHEMES["MXFP6"], torch.float16, torch.float16, (9, 64)),
    "mxfp6-e3m2": (E3M2, torch.bfloat16, torch.float32, (8, 96)),
    "mxfp8": (PRESET_SCHEMES["MXFP8"], torch.float32, torch.float32, (9, 128)),
    "mxfp8-e5m2": (E5M2, torch.bfloat16, torch.float32, (8, 40)),
    "mxint4": (PRESET_SCHEMES["MXINT4"], torch.float32, torch.float16, (9, 96)),
    "mxint8": (PRESET_SCHEMES["MXINT8"], torch.bfloat16, torch.float32, (11, 64)),
    "nvfp4": (PRESET_SCHEMES["NVFP4"], torch.float32, torch.float32, (10, 208)),
    "nvfp4-short-groups": (PRESET_SCHEMES["NVFP4"], torch.float32, torch.float16, (9, 21)),
    "fp8-row": (FP8, torch.bfloat16, torch.float16, (8, 2 * LONGEST_RUN + 44)),
    "fp8-row-e5m2": (FP8.replace(data_type="fp_e5m2", scale_dtype="float32"), torch.float32, torch.float32, (8, 50)),
    "fp8-tensor": (FP8.replace(group_size=0, scale_dtype="float32"), torch.float32, torch.float32, (8, 300)),
    "fp8-block": (FP8.replace(group_size=(4, 48), scale_dtype="float16"), torch.bfloat16, torch.float32, (10, 200)),
    "fp8-long-groups": (
        FP8.replace(group_size=2 * LONGEST_RUN, scale_dtype="float16"),
        torch.float32,
        torch.float32,
        (5, 3 * LONGEST_RUN),
    ),
}
# Magnitudes of rows. Curvatures need their squares in float32, gradients of scales their reciprocals.
MODERATE, EXTREME = (1e-18, 1e18), (1e-39, 1e36)


def make_weight(scheme, dtype, shape, *, is_extreme=False, curved=False, parts=1):
    rng = torch.Generator().manual_seed(scheme.bits)
    weight = torch.randn(shape, generator=rng)
    weight[1] = 0  # scales at their smallest
    if dtype != torch.float16:
        small, large = EXTREME if is_extreme and dtype == torch.float32 else MODERATE
        weight[2] *= small
        weight[3] *= large
    weight[4, 5] = 100  # the rest of its group rounds to 0
    weight = weight.to(dtype)
    data_type = DATA_TYPES[scheme.data_type]
    params = data_type.trainable(weight, scheme)
    in_rows = params["rounding"].flatten(1)[:, : shape[1]]  # padding has no offsets
    in_rows.copy_(torch.rand(in_rows.shape, generator=rng) - 0.5)
    params["max_scale"].uniform_(0.5, 1.1, generator=rng)  # small scales: much saturates
    inputs = (shape[1],) if parts == 1 else (parts, shape[1])
    curvature = Curvature(torch.rand(shape[0], generator=rng), torch.rand(inputs, generator=rng)) if curved else None
    range_ = data_type.minmax_range(weight, scheme)
    return TunedWeight(weight, scheme, data_type, range_, params, curvature, 0.5, parts)


if IS_INTERPRETED:

    @triton.jit
    def element_kernel(
        x, rounded, count, LARGEST: tl.constexpr, FRACTION_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr,
        MAX_EXPONENT: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        value = to_element(tl.load(x + n, mask=n < count), LARGEST, FRACTION_BITS, MIN_EXPONENT, MAX_EXPONENT)
        tl.store(rounded + n, value, mask=n < count)

    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
    def test_numbers_round_as_those_of_elements(kind):
        """Every number of bfloat16, numbers of the element, points halfway between them, and neighbours of all."""
        x = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
        levels = kind.round(x[~x.isnan()]).unique()
        x = torch.cat([x[~x.isnan()], levels, (levels[1:] + levels[:-1]) / 2])
        up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        x = torch.cat([x, torch.nextafter(x, up), torch.nextafter(x, down)])
        rounded = torch.empty_like(x)
        element_kernel[(triton.cdiv(len(x), 8192),)](
            x, rounded, len(x), kind.largest, kind.fraction_bits, kind.min_exponent, kind.max_exponent, SIZE=8192
        )
        assert torch.equal(rounded, kind.round(x))
        # To the bit what `fake_quantize` has, where no zero is negative.
        assert torch.equal(rounded.view(torch.int32), (kind.round(x) + 0.0).view(torch.int32))

    def test_parts_of_a_weight_have_each_its_own_curvature_and_stay_without_a_gradient():
        shape = (12, 75)
        mine, other = (make_weight(PRESET_SCHEMES["MXFP4"], torch.float32, shape, curved=True, parts=3) for _ in "12")
        before = mine.params["rounding"].clone()
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-2
        gradient[4:8] = 0
        FusedFloat(mine, torch.float32).move(gradient, torch.tensor(1.0), 0.13, 0.0)
        step_with_autograd(other.reached_by(gradient), gradient, 1.0, 0.13, 0.0)
        assert torch.equal(mine.params["rounding"], other.params["rounding"])
        same = (mine.params["rounding"] == before).unflatten(0, (3, -1)).flatten(1).all(1)
        assert same.tolist() == [False, True, False]

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize(
        ("clip_size", "options"),
        [(0.0, {"is_extreme": True}), (0.0, {"curved": True}), (0.05, {}), (0.05, {"curved": True})],
        ids=["plain", "curved", "clips", "curved-clips"],
    )
    def test_steps_are_those_of_autograd(case, clip_size, options):
        scheme, dtype, block_dtype, shape = case
        mine, other = (make_weight(scheme, dtype, shape, **options) for _ in range(2))
        fused = FusedFloat(mine, block_dtype)
        assert torch.equal(fused.dequantized, other.dequantized().to(block_dtype))
        rng = torch.Generator().manual_seed(1)
        for decay in (torch.tensor(1.0), torch.tensor(0.7), torch.tensor(0.3)):
            gradient = torch.randn(shape, generator=rng).to(block_dtype)
            before = {name: tensor.clone() for name, tensor in mine.params.items()}
            fused.move(gradient, decay, 0.13, clip_size, unit=0.3)
            step_with_autograd(other, gradient.float() * 0.3, decay, 0.13, clip_size)
            for name, tensor in mine.params.items():
                assert torch.equal(tensor, other.params[name]), name
                assert torch.equal(tensor, before[name]) == (name != "rounding" and clip_size == 0), name
            assert torch.equal(fused.dequantized, other.dequantized().to(block_dtype))
            # What is stored in the end is what the block ran with.
            assert torch.equal(fused.dequantized, mine.encoded().dequantize(block_dtype))

    def test_parameters_without_a_gradient_stay():
        tuned = make_weight(FP8, torch.float32, (8, 64))
        before = {name: tensor.clone() for name, tensor in tuned.params.items()}
        FusedFloat(tuned, torch.float32).move(torch.zeros(tuned.weight.shape), torch.tensor(1.0), 0.1, 0.1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.params.items())

    @pytest.mark.parametrize("name", ["MXFP4", "MXFP6", "MXFP8", "MXINT4", "MXINT8", "NVFP4"])
    def test_weights_at_the_end_of_the_grid_move_those_beyond_do_not(name):
        scheme = PRESET_SCHEMES[name]
        end = ELEMENTS[scheme.data_type, scheme.bits].largest
        tuned = make_weight(scheme, torch.float32, (6, 32))
        for value in (tuned.params["max_scale"], *tuned.range_.values()):
            value.fill_(1.0)
        tuned.params["rounding"].zero_()
        beyond = float(torch.nextafter(torch.tensor(end), torch.tensor(torch.inf)))
        tuned.weight.copy_(torch.tensor([0.0, end, -end, beyond, -beyond, end / 2])[:, None])
        fused = FusedFloat(tuned, torch.float32)
        fused.move(torch.ones(6, 32), torch.tensor(1.0), 0.25, 0.0)
        moved = tuned.params["rounding"].flatten(1)
        assert torch.equal(moved, torch.tensor([-0.25, -0.25, -0.25, 0, 0, -0.25])[:, None].expand(6, 32))

    def test_the_cases_are_of_every_element_and_saturate():
        assert {(case[0].data_type, case[0].bits) for case in CASES.values()} == set(ELEMENTS)
        for scheme, dtype, _, shape in CASES.values():
            tuned = make_weight(scheme, dtype, shape)
            state = tuned.data_type.rounding_state(tuned.weight, tuned.scheme, tuned.range_, tuned.params)
            assert 0 < state.in_range.float().mean() < 1

else:

    def test_the_kernel_is_right_in_the_interpreter(run_interpreted):
        assert run_interpreted(__file__) == len(KINDS) + 4 * len(CASES) + 9

    @pytest.mark.parametrize("is_curved", [False, True], ids=["plain", "curved"])
    @pytest.mark.parametrize(
        "left_out",
        [("by_scale",), ("gradient", "decay", "by_scale"), ()],
        ids=["step", "write", "clips"],
    )
    @pytest.mark.parametrize(
        ("scheme", "ones"),
        # Numbers that are 1 become constants when a kernel is launched: here rows of one group.
        [
            (PRESET_SCHEMES["NVFP4"], ()),
            (PRESET_SCHEMES["MXFP8"], ()),
            (FP8.replace(group_size=64), ("runs", "groups")),
        ],
        ids=["nvfp4", "mxfp8", "fp8-row"],
    )
    def test_it_compiles_for_a_gpu_to_the_arithmetic_of_autograd(scheme, ones, left_out, is_curved, ptx_for_hopper):
        kind = ELEMENTS[scheme.data_type, scheme.bits]
        left_out += () if is_curved else ("outputs", "inputs")
        ptx = ptx_for_hopper(
            float_step_kernel,
            dict.fromkeys(("weight", "gradient", "dequantized"), "*bf16")
            | dict.fromkeys(("rounding", "scale", "outputs", "inputs", "decay", "by_scale"), "*fp32")
            | dict.fromkeys(("count", "runs", "width", "group", "groups", "part_rows"), "i32")
            | dict.fromkeys(("unit", "rounding_size", "reach", "share"), "fp32"),
            {"LARGEST": kind.largest, "FRACTION_BITS": kind.fraction_bits, "MIN_EXPONENT": kind.min_exponent}
            | {"MAX_EXPONENT": kind.max_exponent, "COUNTS_SCALES": kind.offsets_count_scales}
            | {"K": scheme.group_size, "WIDE": scheme.group_size, "ROWS": PROGRAM_ELEMENTS // scheme.group_size}
            | dict.fromkeys(left_out)
            | dict.fromkeys(ones, 1),
        )
        assert "div.rn.f32" in ptx
        assert "fma" not in ptx
        assert "ftz" not in ptx
