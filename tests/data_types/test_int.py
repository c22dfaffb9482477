"""The integer data type against formulas worked by hand, closed-form gradients and compressed_tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from hypothesis import given
from hypothesis import strategies as st

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.int import MIN_SCALE
from auto_round.schemes import QuantizationScheme

INT = DATA_TYPES["int"]
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def scheme_of(bits: int, *, sym: bool = True, group_size: int = -1, scale_dtype: str = "fp32") -> QuantizationScheme:
    return QuantizationScheme(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype)


def encode(weight: torch.Tensor, scheme: QuantizationScheme):
    return INT.encode(weight, scheme, INT.minmax_range(weight, scheme), INT.trainable(weight, scheme))


def random_weight(rows: int = 4, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_symmetric_by_hand():
    # 2 bits, extreme -1: scale = -1 / -2 = 0.5; 0.2, 0.4, 0.9 lie at 0.4, 0.8, 1.8 steps, and 1.8 is cut to 1.
    encoded = encode(torch.tensor([[-1.0, 0.2, 0.4, 0.9]]), scheme_of(2))
    assert encoded.scale.tolist() == [[0.5]]
    assert encoded.codes.tolist() == [[0, 2, 3, 3]]
    assert encoded.zero_point is None
    assert encoded.dequantize().tolist() == [[-1.0, 0.0, 0.5, 0.5]]


def test_symmetric_with_a_positive_extreme_has_a_negative_scale():
    encoded = encode(torch.tensor([[1.0, -0.2, -0.4, -0.9]]), scheme_of(2))
    assert encoded.scale.tolist() == [[-0.5]]
    assert encoded.codes.tolist() == [[0, 2, 3, 3]]
    assert encoded.dequantize().tolist() == [[1.0, 0.0, -0.5, -0.5]]


@given(bits=st.sampled_from(WIDTHS), group_size=st.sampled_from([-1, 16, 24]), seed=st.integers(0, 2**31))
def test_the_extreme_of_a_group_is_code_0_and_kept(bits, group_size, seed):
    weight = random_weight(3, 48, seed)
    encoded = encode(weight, scheme_of(bits, group_size=group_size))
    grouped = weight.unflatten(1, (-1, 48 if group_size == -1 else group_size))
    at = grouped.abs().argmax(-1, keepdim=True)
    assert (encoded.codes.reshape(grouped.shape).gather(-1, at) == 0).all()
    extreme = grouped.gather(-1, at)
    assert torch.equal(encoded.dequantize().reshape(grouped.shape).gather(-1, at), extreme)
    assert torch.equal(encoded.scale.sign(), -extreme.squeeze(-1).sign())


def test_asymmetric_by_hand():
    # 2 bits: scale = (1 + 0.5) / 3 = 0.5, zero = 0.5 / 0.5 = 1.
    encoded = encode(torch.tensor([[-0.5, 0.1, 0.6, 1.0]]), scheme_of(2, sym=False))
    assert encoded.scale.tolist() == [[0.5]]
    assert encoded.zero_point.tolist() == [[1]]
    assert encoded.codes.tolist() == [[0, 1, 2, 3]]
    assert encoded.dequantize().tolist() == [[-0.5, 0.0, 0.5, 1.0]]


def test_asymmetric_zero_point_stays_above_0_without_negative_weights():
    # 2 bits, 0..3: scale 1; zero point 0 has no stored form, so it is 1 and the top weight is cut to 3 - 1.
    encoded = encode(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), scheme_of(2, sym=False))
    assert encoded.zero_point.tolist() == [[1]]
    assert encoded.dequantize().tolist() == [[0.0, 1.0, 2.0, 2.0]]


def test_asymmetric_without_positive_weights():
    encoded = encode(torch.tensor([[-3.0, -2.0, -1.0, 0.0]]), scheme_of(2, sym=False))
    assert encoded.zero_point.tolist() == [[3]]
    assert encoded.codes.tolist() == [[0, 1, 2, 3]]
    assert encoded.dequantize().tolist() == [[-3.0, -2.0, -1.0, 0.0]]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_on_the_grid_are_kept_exactly(bits, sym):
    half, levels = 2 ** (bits - 1), 2**bits
    weight = (torch.arange(levels, dtype=torch.float32) - half)[None] * 0.25
    encoded = encode(weight, scheme_of(bits, sym=sym))
    assert torch.equal(encoded.dequantize(), weight)
    assert encoded.codes.tolist() == [list(range(levels))]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_encode_then_dequantize_equals_fake_quantize(bits, scale_dtype, sym):
    weight = random_weight(5, 72) * 0.03
    for group_size in (-1, 0, 16, 32):
        scheme = scheme_of(bits, sym=sym, group_size=group_size, scale_dtype=scale_dtype)
        generator = torch.Generator().manual_seed(bits)
        params = {
            name: torch.rand(value.shape, generator=generator) - (0.5 if name == "rounding" else -0.5)
            for name, value in INT.trainable(weight, scheme).items()
        }
        range_ = INT.minmax_range(weight, scheme)
        encoded = INT.encode(weight, scheme, range_, params)
        assert torch.equal(encoded.dequantize(), INT.fake_quantize(weight, scheme, range_, params))


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16"])
def test_scales_are_rounded_before_codes_are_chosen(scale_dtype, sym):
    scheme = scheme_of(8, sym=sym, scale_dtype=scale_dtype)
    weight = random_weight()
    exact = encode(weight, scheme_of(8, sym=sym))
    rounded = encode(weight, scheme)
    dtype = getattr(torch, scheme.scale_dtype)
    assert torch.equal(rounded.scale, exact.scale.to(dtype).float())
    zero = rounded.zero_points().float()
    expected = ((weight / rounded.scale).round() + zero).clamp(0, 255)
    assert torch.equal(rounded.codes.float(), expected)


# A row of 2-bit codes with scale 0.5 and range [-2, 1] steps: -2 (extreme), 0.4 steps, 0.8 steps, and 1.8 steps, cut.
SYM_ROW = torch.tensor([[-1.0, 0.2, 0.4, 0.9]])
UPSTREAM = torch.tensor([[1.0, 2.0, 4.0, 8.0]])


def gradients(weight: torch.Tensor, scheme: QuantizationScheme, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    params = {name: value.requires_grad_() for name, value in INT.trainable(weight, scheme).items()}
    fake = INT.fake_quantize(weight, scheme, INT.minmax_range(weight, scheme), params)
    fake.backward(upstream)
    return {name: value.grad for name, value in params.items()}


def test_gradient_of_the_rounding_offset_is_the_scale_inside_the_range_and_0_outside():
    found = gradients(SYM_ROW, scheme_of(2), UPSTREAM)["rounding"]
    assert found.tolist() == [[[0.5 * 1, 0.5 * 2, 0.5 * 4, 0.0]]]


def test_gradient_of_the_rounding_offset_carries_the_sign_of_the_scale():
    found = gradients(-SYM_ROW, scheme_of(2), UPSTREAM)["rounding"]
    assert found.tolist() == [[[-0.5 * 1, -0.5 * 2, -0.5 * 4, 0.0]]]


def test_gradient_of_the_symmetric_clip_factor_by_hand():
    # W_hat = s m (round(W / (s m)) ...). Inside: s (level - W / s); cut: s * level. Levels -2, 0, 1, 1 at
    # -2, 0.4, 0.8, 1.8 steps: 0.5 * (1 * 0 + 2 * -0.4 + 4 * 0.2 + 8 * 1) = 4.
    found = gradients(SYM_ROW, scheme_of(2), UPSTREAM)["max_scale"]
    # Each quotient W / s is rounded once in float32.
    assert found.item() == pytest.approx(4.0, rel=1e-6)


def test_gradients_of_the_asymmetric_clip_factors_by_hand():
    # low -0.5, high 1, 2 bits: s = 0.5, z = 1. Levels of (-0.5, 0.1, 0.6, 1): -1, 0, 1, 2 at -1, 0.2, 1.2, 2 steps.
    # Nothing is cut, so z drops out and dW_hat / ds = level - W / s = (0, -0.2, -0.2, 0): upstream gives -0.4 - 0.8.
    # ds / dmax = high / 3 and ds / dmin = -low / 3.
    found = gradients(torch.tensor([[-0.5, 0.1, 0.6, 1.0]]), scheme_of(2, sym=False), UPSTREAM)
    assert found["max_scale"].item() == pytest.approx(-1.2 * 1 / 3, rel=1e-5)
    assert found["min_scale"].item() == pytest.approx(-1.2 * 0.5 / 3, rel=1e-5)
    assert found["rounding"].tolist() == [[[0.5, 1.0, 2.0, 4.0]]]


def test_gradients_of_the_asymmetric_clip_factors_where_a_weight_is_cut():
    # Clip factors m = M = 0.5 on low -1, high 2, 2 bits: s = 0.5, z = 1. The weight 2 is cut at level 3 - 1 = 2, so
    # W_hat = s (3 - z): dW_hat / dM = 2 ds/dM - s dz/dM, with ds/dM = 2/3 and dz/dM = -(z / s) ds/dM = -4/3; in all
    # 4/3 + 2/3 = 2.
    # dW_hat / dm = 2 ds/dm - s dz/dm, with ds/dm = 1/3 and dz/dm = 1 / s - (z / s) ds/dm = 4/3: 2/3 - 2/3 = 0.
    # In all: W_hat = high * M, as it must be.
    scheme = scheme_of(2, sym=False)
    weight = torch.tensor([[-1.0, 2.0]])
    params = INT.trainable(weight, scheme)
    params = {name: (value if name == "rounding" else value * 0.5).requires_grad_() for name, value in params.items()}
    fake = INT.fake_quantize(weight, scheme, INT.minmax_range(weight, scheme), params)
    assert fake.tolist() == [[-0.5, 1.0]]
    fake.backward(torch.tensor([[0.0, 1.0]]))
    assert params["max_scale"].grad.item() == pytest.approx(2.0, rel=1e-6)
    assert params["min_scale"].grad.item() == pytest.approx(0.0, abs=1e-6)
    assert params["rounding"].grad.tolist() == [[[0.0, 0.0]]]


ODD_GROUPS = {
    "zeros": torch.zeros(1, 32),
    "negative zeros": -torch.zeros(1, 32),
    "a positive constant": torch.full((1, 32), 0.7),
    "a negative constant": torch.full((1, 32), -0.7),
    "one huge value": torch.tensor([[1e30] + [1e-3] * 31]),
    "one huge negative value": torch.tensor([[-1e30] + [1e-3] * 31]),
    "beyond float16": torch.tensor([[1e6] + [-1e6] + [1e-3] * 30]),
    "denormals": torch.full((1, 32), 1e-40),
    "smaller than a float16": torch.tensor([[1e-9, -1e-9] * 16]),
    "one value": torch.tensor([[0.0] * 31 + [1.0]]),
}


@pytest.mark.parametrize("name", ODD_GROUPS)
@pytest.mark.parametrize("scale_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_odd_groups_stay_finite(name, scale_dtype, sym, bits):
    weight = ODD_GROUPS[name]
    scheme = scheme_of(bits, sym=sym, group_size=32, scale_dtype=scale_dtype)
    for range_ in (INT.minmax_range(weight, scheme), INT.search_range(weight, scheme, None)):
        params = {key: value.requires_grad_() for key, value in INT.trainable(weight, scheme).items()}
        fake = INT.fake_quantize(weight, scheme, range_, params)
        encoded = INT.encode(weight, scheme, range_, params)
        assert torch.equal(encoded.dequantize(), fake)
        assert fake.isfinite().all()
        assert (encoded.scale.abs() >= MIN_SCALE[scheme.scale_dtype]).all()
        assert torch.equal(encoded.scale, encoded.scale.to(getattr(torch, scheme.scale_dtype)).float())
        fake.sum().backward()
        assert all(value.grad.isfinite().all() for value in params.values())


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_stay_zeros(bits, sym):
    scheme = scheme_of(bits, sym=sym, group_size=16, scale_dtype="fp16")
    weight = torch.zeros(2, 32)
    assert not encode(weight, scheme).dequantize().any()


@pytest.mark.parametrize("value", [0.7, -0.7])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_symmetric_constant_is_kept(bits, value):
    weight = torch.full((1, 16), value)
    assert torch.equal(encode(weight, scheme_of(bits)).dequantize(), weight)


def test_one_scale_per_row_differs_between_rows():
    encoded = encode(torch.tensor([[-1.0, 0.5], [-8.0, 4.0]]), scheme_of(2))
    assert encoded.scale.tolist() == [[0.5], [4.0]]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_one_scale_per_tensor_is_the_same_in_all_rows(sym):
    scheme = scheme_of(2, sym=sym, group_size=0)
    weight = torch.tensor([[-1.0, 0.5], [-6.0, 4.0]])
    encoded = encode(weight, scheme)
    # Symmetric: -6 / -2; asymmetric: (4 + 6) / 3.
    assert encoded.scale.flatten().tolist() == pytest.approx([3.0, 3.0] if sym else [10 / 3, 10 / 3])
    assert INT.trainable(weight, scheme)["max_scale"].shape == (1, 1, 1)


def test_a_shorter_last_group_ignores_its_padding():
    weight = torch.tensor([[-1.0, 0.5, 0.25, 0.75]])
    scheme = scheme_of(2, group_size=3, sym=False)
    encoded = encode(weight, scheme)
    # The second group holds 0.75 alone (and 0, which every range covers): scale 0.25.
    assert encoded.scale.tolist() == [[0.5, 0.25]]
    assert encoded.shape == (1, 4)
    assert INT.trainable(weight, scheme)["rounding"].shape == (1, 2, 3)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_covered_weight_is_off_by_half_a_step_at_most(bits, sym):
    weight = random_weight(8, 64)
    scheme = scheme_of(bits, sym=sym, group_size=32)
    encoded = encode(weight, scheme)
    step = encoded.scale.abs().repeat_interleave(32, dim=1)
    error = (encoded.dequantize() - weight).abs()
    # The side away from a symmetric extreme has one level less; an asymmetric zero point is rounded, which moves both
    # ends by up to half a step: there, up to one step. Within float32 rounding of the quotient.
    inside = (encoded.codes > 0) & (encoded.codes < 2**bits - 1)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert (error <= 1.0001 * step).all()


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_fake_quantize_of_compressed_tensors(bits, sym, group_size):
    """With the same scale and zero point; theirs adds the zero point before rounding, which differs at ties only."""
    weight = random_weight(6, 96)
    encoded = encode(weight, scheme_of(bits, sym=sym, group_size=group_size))
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=sym,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    zero = (encoded.zero_points().to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = their_fake_quantize(weight, encoded.scale, zero, args)
    assert torch.equal(encoded.dequantize(), theirs)
