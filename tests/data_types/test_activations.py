"""Quantized activations against values worked by hand and against compressed_tensors, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from auto_round.data_types.activations import ACTIVATIONS, quantize_activation, stored_peak, why_not_activation
from auto_round.data_types.nvfp4 import global_scale
from auto_round.schemes import PRESET_SCHEMES, STATIC_GLOBAL_SCALE, ActivationScheme


def scheme_of(data_type: str, bits: int, group_size: int, *, sym: bool = True, dynamic: bool = True):
    return ActivationScheme(data_type=data_type, bits=bits, group_size=group_size, sym=sym, dynamic=dynamic)


INT8 = scheme_of("int", 8, -1)
FP8 = scheme_of("fp", 8, -1)
MXFP4 = scheme_of("mx_fp", 4, 32)
NVFP4 = scheme_of(STATIC_GLOBAL_SCALE, 4, 16)


def activations(seed: int = 0, width: int = 256) -> torch.Tensor:
    """Returns (2, 5, width) values whose tokens differ in size by a factor of 1000, one of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, width, generator=generator) * torch.logspace(-2, 1, 5)[:, None]
    x[1, 3] = 0
    return x


def theirs(x: torch.Tensor, whole: torch.Tensor | None = None, **args: Any) -> torch.Tensor:
    described = QuantizationArgs(**args)
    scale, zero = compute_dynamic_scales_and_zp(x, described, torch.nn.Module(), global_scale=whole)
    return fake_quantize(x, scale, zero, described, global_scale=whole)


def test_int8_per_token_by_hand():
    # Scales 1 and 0.01; -1.5 is a tie.
    x = torch.tensor([[127.0, -1.5, 0.4, 1.6], [0.004, -1.27, 0.0, 0.016]])
    assert torch.allclose(
        quantize_activation(x, INT8), torch.tensor([[127.0, -2, 0, 2], [0.0, -1.27, 0, 0.02]]), rtol=1e-6, atol=0
    )


def test_int8_asymmetric_by_hand():
    # From 0 (always inside) to 255: scale 1, zero point 0. From -100 to 155: zero point 100.
    x = torch.tensor([[10.2, 255.0, 3.0, 7.7], [-100.0, 155.0, 0.4, -0.6]])
    rounded = quantize_activation(x, scheme_of("int", 8, -1, sym=False))
    assert rounded.tolist() == [[10, 255, 3, 8], [-100, 155, 0, -1]]


def test_a_calibrated_range_cuts_what_is_beyond_it():
    x = torch.tensor([0.5, 12.7, 100.0, -100.0])
    static = scheme_of("int", 8, 0, dynamic=False)
    assert torch.allclose(
        quantize_activation(x, static, torch.tensor(12.7)), torch.tensor([0.5, 12.7, 12.7, -12.8]), rtol=1e-6
    )
    # FP8: scale 1, so 460 and beyond end at 448; 1.05 lies between 1 and 1.125.
    x = torch.tensor([1.05, 448.0, 1000.0, -1000.0])
    static = scheme_of("fp", 8, 0, dynamic=False)
    assert quantize_activation(x, static, torch.tensor(448.0)).tolist() == [1.0, 448.0, 448.0, -448.0]


@pytest.mark.parametrize(
    ("peak", "scale"), [(4.0, 1.0), (6.0, 1.0), (6.9, 1.0), (7.0, 2.0), (7.9, 2.0), (8.0, 2.0), (3.5, 1.0), (3.4, 0.5)]
)
def test_mxfp4_takes_the_power_of_two_that_the_peak_is_nearer_to(peak, scale):
    x = torch.zeros(1, 32)
    x[0, 0] = peak
    x[0, 1] = 0.5 * scale  # the smallest number of FP4 but for zero
    x[0, 2] = 0.24 * scale
    rounded = quantize_activation(x, MXFP4)
    assert rounded[0, 1:3].tolist() == [0.5 * scale, 0.0]


@pytest.mark.parametrize(("peak", "scale"), [(6.0, 1.0), (6.1, 2.0), (12.0, 2.0), (0.75, 0.125), (0.76, 0.25)])
def test_mxfp4_rceil_never_saturates(peak, scale):
    x = torch.zeros(1, 32)
    x[0, 0] = peak
    x[0, 1] = 0.5 * scale
    x[0, 2] = 0.24 * scale
    rounded = quantize_activation(x, scheme_of("mx_fp_rceil", 4, 32))
    assert rounded[0, 1:3].tolist() == [0.5 * scale, 0.0]
    assert abs(float(rounded[0, 0]) - peak) <= scale  # half of the widest gap of FP4


def test_nvfp4_by_hand():
    # Peak 42: global scale 64. The first group's scale 6 / 6 * 64 is an E4M3 number, so its step is 1; the second's is
    # 2.1 / 6 * 64 = 22.4, rounded to 22: 1.2 / (22 / 64) = 3.49 becomes 3 of these.
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([6.0, 2.6, -0.2])
    x[0, 16:18] = torch.tensor([2.1, 1.2])
    rounded = quantize_activation(x, NVFP4, torch.tensor(42.0))
    assert rounded[0, :3].tolist() == [6.0, 3.0, 0.0]
    assert rounded[0, 16:18].tolist() == [6 * 22 / 64, 3 * 22 / 64]


def test_nvfp4_groups_far_below_the_peak_become_zeros():
    # The smallest E4M3 number is 2**-9; a scale below half of it is stored as 0.
    x = torch.zeros(1, 32)
    x[0, 0] = 2688.0  # global scale 1
    x[0, 16] = 6 * 2.0**-11
    rounded = quantize_activation(x, NVFP4, torch.tensor(2688.0))
    assert rounded[0, 16] == 0
    x[0, 16] = 6 * 2.0**-9
    assert quantize_activation(x, NVFP4, torch.tensor(2688.0))[0, 16] == 6 * 2.0**-9


@pytest.mark.parametrize("width", [128, 160])
def test_fp8_is_what_compressed_tensors_computes(width):
    x = activations(width=width)
    args = {"num_bits": 8, "type": "float", "dynamic": True}
    assert torch.equal(quantize_activation(x, FP8), theirs(x, strategy="token", **args))
    if width % 128 == 0:
        grouped = quantize_activation(x, scheme_of("fp", 8, 128))
        assert torch.equal(grouped, theirs(x, strategy="group", group_size=128, **args))
    static, peak = scheme_of("fp", 8, 0, dynamic=False), torch.tensor(3.1)
    described = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    expected = fake_quantize(x, (peak / 448).reshape(1), torch.zeros(1), described)
    assert torch.equal(quantize_activation(x, static, peak), expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mx_is_what_compressed_tensors_computes(bits):
    x = activations()
    # Peaks at and around the borders between powers of two.
    x[0, 0, ::32] = torch.tensor([1.75, 1.7499999, 1.9375, 1.9374999, 7.0, 3.4999998, 448.0, 480.0])
    args = {"num_bits": bits, "type": "float", "dynamic": True, "strategy": "group", "group_size": 32}
    expected = theirs(x, scale_dtype=torch.uint8, **args)
    assert torch.equal(quantize_activation(x, scheme_of("mx_fp", bits, 32)), expected)


@pytest.mark.parametrize("peak", [40.0, 5.0, 1e4])
def test_nvfp4_is_what_compressed_tensors_computes(peak):
    x, peak = activations(), torch.tensor(peak)
    args = {"num_bits": 4, "type": "float", "dynamic": "local", "strategy": "tensor_group", "group_size": 16}
    expected = theirs(x, global_scale(peak).reshape(1), scale_dtype=torch.float8_e4m3fn, **args)
    assert torch.equal(quantize_activation(x, NVFP4, peak), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_what_compressed_tensors_computes_with_the_scale_of_kernels(bits):
    """Its own scale is peak / 127.5; vLLM's and SGLang's kernels take peak / 127 (scaled_quant.cu, int8_kernel.py)."""
    x = activations()
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=1e-10)
    args = QuantizationArgs(num_bits=bits, strategy="token", dynamic=True)
    expected = fake_quantize(x, scale, torch.zeros_like(scale), args)
    assert torch.equal(quantize_activation(x, scheme_of("int", bits, -1)), expected)
    # Its own scale differs by 0.4 % for 8 bits.
    own = theirs(x, num_bits=bits, strategy="token", dynamic=True)
    assert (quantize_activation(x, scheme_of("int", bits, -1)) - own).abs().max() <= float(scale.max()) * 1.5


def test_asymmetric_integers_are_what_compressed_tensors_computes():
    x = activations() + 0.3
    ours = quantize_activation(x, scheme_of("int", 8, -1, sym=False))
    expected = theirs(x, num_bits=8, symmetric=False, strategy="token", dynamic=True)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)


EVERY = [
    INT8, scheme_of("int", 8, 0), scheme_of("int", 8, 32, sym=False), scheme_of("int", 4, -1),
    FP8, scheme_of("fp", 8, 128), scheme_of("fp_e5m2", 8, -1),
    MXFP4, scheme_of("mx_fp", 6, 32), scheme_of("mx_fp", 8, 32), scheme_of("mx_fp_rceil", 8, 32),
    scheme_of("mx_fp_e3m2", 6, 32), scheme_of("mx_fp_e5m2", 8, 32), scheme_of("mx_int", 8, 32),
    scheme_of("mx_int", 4, 32),
    NVFP4, scheme_of("nv_fp", 4, 16),
]  # fmt: skip


def test_every_activation_type_is_tested_here():
    assert {scheme.data_type for scheme in EVERY} == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_zeros_stay_zeros_and_everything_is_finite(scheme, dtype):
    peak = torch.tensor(20.0) if scheme.needs_calibration else None
    for x in (activations().to(dtype), activations().to(dtype) * 1e-30, activations().to(dtype) * 1e30):
        before = x.clone()
        rounded = quantize_activation(x, scheme, peak)
        assert rounded.dtype == dtype
        assert rounded.isfinite().all()
        assert not rounded[1, 3].any()
        assert torch.equal(x, before)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_the_error_is_within_a_step(scheme):
    x = activations()
    peak = x.abs().amax() if scheme.needs_calibration else None
    rounded = quantize_activation(x, scheme, peak)
    # The widest gap of any of these types, FP4's, is a third of the largest number; saturation costs as much again.
    assert ((rounded - x).abs() <= x.abs().amax() / 3).all()
    assert (rounded - x).square().mean() < 0.02 * x.square().mean()


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_gradients_pass_unchanged(scheme):
    x = activations().requires_grad_()
    weights = torch.arange(x.numel()).reshape(x.shape).float()
    (quantize_activation(x, scheme, torch.tensor(20.0)) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_a_short_last_group_is_a_group():
    x = torch.zeros(1, 40)
    x[0, 32:] = 5.0
    x[0, 0] = 1000.0
    assert quantize_activation(x, scheme_of("int", 8, 32))[0, 32:].tolist() == pytest.approx([5.0] * 8)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (scheme_of("int", 8, -1), None),
        (scheme_of("int", 6, -1), "act_bits=6"),
        (scheme_of("fp", 4, -1), "act_bits=4"),
        (scheme_of("mx_fp_rceil", 8, 32), None),
        (scheme_of("mx_fp", 5, 32), "act_bits=5"),
        (scheme_of("mx_fp", 4, 16), "act_group_size=16"),
        (scheme_of(STATIC_GLOBAL_SCALE, 4, 32), "act_group_size=32"),
        (scheme_of(STATIC_GLOBAL_SCALE, 8, 16), "act_bits=8"),
        (scheme_of("fp", 8, -1, dynamic=False), "calibrated ranges"),
        (scheme_of("fp", 8, 0, dynamic=False), None),
        (scheme_of("mx_fp", 8, 32, dynamic=False), "calibrated ranges"),
        (scheme_of("q8_k", 8, 32), "act_data_type=q8_k"),
    ],
    ids=str,
)
def test_what_activations_cannot_be_is_said(scheme, reason):
    found = why_not_activation(scheme)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def test_the_calibrated_peak_is_the_one_that_its_stored_scale_stands_for():
    static, peak = PRESET_SCHEMES["FP8_STATIC"], torch.tensor(13.7)
    kept = stored_peak(peak, static)
    assert torch.equal((kept / 448).bfloat16().float() * 448, kept)
    assert torch.equal((peak / 448).bfloat16(), (kept / 448).bfloat16())
    assert torch.equal(stored_peak(peak, PRESET_SCHEMES["NVFP4"]), peak)
