from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.elements import E4M3
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme, preset_name_to_scheme
from auto_round.tuning import round_plain
from auto_round.tuning.scale_factors import SCALE_FACTORS, why_not_tunable

SCHEMES = {
    "W2A16G32": preset_name_to_scheme("W2A16G32"),
    "W4 asym": QuantizationScheme(bits=4, group_size=32, sym=False),
    "W3 per row": QuantizationScheme(bits=3, group_size=-1),
    "W8 per tensor": QuantizationScheme(bits=8, group_size=0),
    "W4 bf16 scales": QuantizationScheme(bits=4, group_size=32, scale_dtype="bf16"),
    "FP8 per row": preset_name_to_scheme("FPW8A16"),
    "FP8 blocks": QuantizationScheme.from_dict({"data_type": "fp", "group_size": (32, 32)}),
    "NVFP4": preset_name_to_scheme("NVFP4A16"),
    "Q2_K": preset_name_to_scheme("GGUF:Q2_K"),
    "Q3_K": preset_name_to_scheme("GGUF:Q3_K"),
    "Q4_1": preset_name_to_scheme("GGUF:Q4_1"),
}


@pytest.fixture(params=list(SCHEMES), ids=list(SCHEMES))
def weight(request):
    values = torch.randn(50, 72, generator=torch.Generator().manual_seed(1))
    return round_plain(values, SCHEMES[request.param])


def factors_of(weight):
    return SCALE_FACTORS[weight.scheme.data_type]


def moved(weight, size):
    start = factors_of(weight).start(weight)
    return size * torch.randn(start.shape, generator=torch.Generator().manual_seed(2))


def test_the_start_is_the_weight_itself(weight):
    factors = factors_of(weight)
    same = factors.rescaled(weight, factors.start(weight))
    assert torch.equal(same.scale, weight.scale)
    assert torch.equal(same.dequantize(), weight.dequantize())


def test_codes_zero_points_and_signs_of_scales_stay(weight):
    changed = factors_of(weight).rescaled(weight, moved(weight, 0.1))
    assert changed.codes is weight.codes
    assert changed.zero_point is weight.zero_point
    assert torch.equal(changed.scale.sign(), weight.scale.sign())
    assert not torch.equal(changed.dequantize(), weight.dequantize())


def test_scales_are_numbers_that_can_be_stored(weight):
    changed = factors_of(weight).rescaled(weight, moved(weight, 0.1))
    dtype = getattr(torch, weight.scheme.scale_dtype)
    if weight.scheme.data_type == "nv_fp":
        assert torch.equal(changed.scale, E4M3.round(changed.scale))
        assert changed.global_scale.dtype == torch.float32
    elif weight.scheme.data_type == "int_dq":
        for value, unit in ((changed.scale, changed.super_scale), (changed.offset, changed.super_offset)):
            if value is not None:
                assert torch.equal(unit, unit.to(dtype).float())
                spread = unit.repeat_interleave(weight.scheme.super_group_size, dim=1)[:, : value.shape[1]]
                codes = torch.where(spread == 0, 0, value / spread).round()
                assert torch.equal(codes * spread, value)
    else:
        for value in (changed.scale, changed.offset):
            assert value is None or torch.equal(value, value.to(dtype).float())


def test_rows_that_share_a_scale_still_do(weight):
    changed = factors_of(weight).rescaled(weight, moved(weight, 0.1))
    rows = {0: 50, (32, 32): 32}.get(weight.scheme.group_size, 1)
    for start in range(0, 50, rows):
        assert torch.equal(changed.scale[start : start + rows], changed.scale[start].expand(min(rows, 50 - start), -1))


def test_weights_move_by_the_factor(weight):
    """Where there is an offset too, both parts get the same factor here."""
    sigma = moved(weight, 0.3)
    factor = sigma.exp() if sigma.ndim == 0 else sigma.exp().amax()
    changed = factors_of(weight).rescaled(weight, torch.full_like(sigma, float(factor.log())))
    # Scales are rounded to 8 bits (bfloat16) at worst; scale and offset may be larger than their sum.
    largest = float(weight.dequantize().abs().amax())
    expected = weight.dequantize() * factor
    torch.testing.assert_close(changed.dequantize(), expected, rtol=2**-8, atol=2**-9 * largest)


def test_the_gradient_is_the_slope(weight):
    """d/d sigma of sum(G * W_hat(sigma)), by differences with scales that are not rounded (float32)."""
    weight = dataclasses.replace(weight, scheme=weight.scheme.replace(scale_dtype="fp32"))
    factors = factors_of(weight)
    by_weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    dense = weight.dequantize()
    found = factors.gradient(by_weight, dense, weight)
    assert found.shape == factors.start(weight).shape
    step = 2.0**-6
    for index in [0, found.numel() // 2, found.numel() - 1]:
        moved_one = torch.zeros(found.numel())
        moved_one[index] = step
        up, down = (
            factors.rescaled(weight, sign * moved_one.view(found.shape)).dequantize().double() for sign in (1, -1)
        )
        slope = ((up - down) * by_weight.double()).sum() / (2 * step)
        # The difference is (1 + step**2 / 6) times the slope; the rest is float32.
        assert float(found.flatten()[index]) == pytest.approx(float(slope), rel=1e-3, abs=1e-3)


def test_a_scale_that_would_vanish_stays_at_the_smallest_one():
    weight = round_plain(torch.full((1, 32), 1e-6), SCHEMES["W2A16G32"])
    changed = factors_of(weight).rescaled(weight, torch.full((1, 1), -20.0))
    assert float(changed.scale.abs()) == 2.0**-17


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "MXINT8"])
def test_powers_of_two_are_not_tunable(name):
    assert "powers of two" in why_not_tunable(PRESET_SCHEMES[name])


@pytest.mark.parametrize("name", ["W2A16G64", "W4A8", "INT8_W8A8", "NVFP4", "FP8_BLOCK", "FP8_STATIC"])
def test_other_presets_are_tunable(name):
    assert why_not_tunable(PRESET_SCHEMES[name]) is None


def test_a_data_type_without_a_rule_is_refused():
    assert "no rule" in why_not_tunable(QuantizationScheme(data_type="unheard_of"))
