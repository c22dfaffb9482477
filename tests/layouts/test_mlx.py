from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.layouts import LAYOUTS
from auto_round.layouts.mlx import BITS, GROUP_SIZES
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

MLX = LAYOUTS["mlx"]


@given(
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 2**31),
)
def test_pack_then_unpack_is_identity(make_weight, check_same_weight, bits, sym, rows, groups, group_size, seed):
    weight = make_weight(rows, groups * group_size, bits=bits, group_size=group_size, sym=sym, seed=seed)
    packed = MLX.pack(weight)
    check_same_weight(MLX.unpack(packed, weight.scheme, weight.shape), weight)
    found = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in packed.items()}
    assert found == MLX.specs(weight.scheme, weight.shape)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_words_scales_and_biases_by_hand():
    """A row of 32 codes 0 1 ... 7 0 1 ... of 4 bits; with scale 0.5 and zero point 3 the bias is -1.5."""
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    scheme = QuantizationScheme(bits=4, group_size=32, sym=False)
    weight = QuantizedTensor(codes, torch.full((1, 1), 0.5), torch.full((1, 1), 3, dtype=torch.uint8), scheme)
    packed = MLX.pack(weight)
    assert packed["weight"].view(torch.int32).tolist() == [[0x76543210] * 4]
    assert (packed["scales"].tolist(), packed["biases"].tolist()) == ([[0.5]], [[-1.5]])
    assert {packed[name].dtype for name in ("scales", "biases")} == {torch.float16}


@pytest.mark.parametrize("bits", BITS)
def test_the_bias_of_a_symmetric_weight_is_exact(make_weight, bits):
    weight = make_weight(8, 64, bits=bits, group_size=32, sym=True)
    packed = MLX.pack(weight)
    assert torch.equal(packed["biases"].float(), -(2.0 ** (bits - 1)) * weight.scale)


@pytest.mark.parametrize("bits", BITS)
def test_the_bias_of_an_asymmetric_weight_is_off_by_its_rounding_alone(make_weight, bits):
    """float16 has 11 bits: half a unit in the last place is 2**-11 of the value, which is zero_point * scale."""
    weight = make_weight(64, 64, bits=bits, group_size=32, sym=False)
    steps = (MLX.pack(weight)["biases"].float() / weight.scale + weight.zero_point.float()).abs()
    assert bool((steps <= weight.zero_point.float() * 2.0**-11 * 1.01).all())


def test_a_group_of_scale_0_reads_as_zeros():
    scheme = QuantizationScheme(bits=4, group_size=32, sym=False)
    zero = torch.full((1, 1), 3, dtype=torch.uint8)
    weight = QuantizedTensor(torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 1), zero, scheme)
    read = MLX.unpack(MLX.pack(weight), scheme, (1, 32))
    assert read.dequantize().tolist() == [[0.0] * 32]


def test_a_bias_that_overflows_is_refused():
    scheme = QuantizationScheme(bits=8, group_size=32)
    weight = QuantizedTensor(torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 1000.0), None, scheme)
    with pytest.raises(ValueError, match="overflows float16"):
        MLX.pack(weight)


@pytest.mark.parametrize(
    ("fields", "width", "part"),
    [
        ({"bits": 7}, 128, "bits=7 (only 2, 3, 4, 5, 6, 8)"),
        ({"data_type": "mx_fp", "group_size": 32}, 128, "data_type=mx_fp"),
        ({"group_size": 0}, 128, "group_size=0"),
        ({"group_size": 16}, 128, "group_size=16 of 128 inputs"),
        ({"group_size": -1}, 96, "group_size=96 of 96 inputs"),
        ({"group_size": 64}, 96, "in whole groups"),
        ({"bits": 8, "sym": False, "scale_dtype": "bf16"}, 128, "float16 holds it"),
        ({"bits": 8, "sym": False}, 128, None),
        ({"bits": 6, "sym": False, "scale_dtype": "bf16"}, 128, None),
        ({"bits": 8, "scale_dtype": "bf16"}, 128, None),
        ({"group_size": -1}, 64, None),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(fields, width, part):
    reason = MLX.refuses(QuantizationScheme(**fields), (8, width))
    assert (reason is None) if part is None else part in reason


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_bfloat16_scales_hold_their_zero_points_up_to_6_bits(make_weight, check_same_weight, sym):
    made = make_weight(64, 64, bits=6, group_size=32, sym=sym)
    scheme = made.scheme.replace(scale_dtype="bf16")
    weight = QuantizedTensor(made.codes, made.scale.bfloat16().float(), made.zero_point, scheme)
    packed = MLX.pack(weight)
    assert packed["scales"].dtype == packed["biases"].dtype == torch.bfloat16
    check_same_weight(MLX.unpack(packed, scheme, weight.shape), weight)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_the_weights_that_were_packed(make_weight, bits, sym):
    mlx = pytest.importorskip("mlx.core")
    mlx.set_default_device(mlx.cpu)
    weight = make_weight(16, 128, bits=bits, group_size=64, sym=sym)
    packed = MLX.pack(weight)
    words = mlx.array(packed["weight"].view(torch.int32).numpy()).view(mlx.uint32)
    scales, biases = (mlx.array(packed[name].float().numpy()) for name in ("scales", "biases"))
    read = torch.from_numpy(np.array(mlx.dequantize(words, scales, biases, group_size=64, bits=bits)))
    # In float32, scale * code + bias has one rounding of 2**-24 more than scale * (code - zero); the bias of an
    # asymmetric weight has that of float16 besides.
    allowed = weight.scale.abs() * (2**bits * 2.0**-23 + (0 if sym else weight.zero_points() * 2.0**-11))
    assert bool(((read - weight.dequantize()).abs() <= allowed.repeat_interleave(64, dim=1)).all())
