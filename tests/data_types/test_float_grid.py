"""Groups, blocks and whole tensors under one scale, and the search that all float types share."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types import float_grid
from auto_round.elements import E2M1
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

MXFP4 = QuantizationScheme.from_dict({"data_type": "mx_fp", "bits": 4})
GRID = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, -10, 11, 12]])


@pytest.mark.parametrize(
    ("group_size", "peaks"),
    [
        (-1, [[4], [8], [12]]),
        (2, [[2, 4], [6, 8], [10, 12]]),
        (3, [[3, 4], [7, 8], [11, 12]]),
        (0, [[12], [12], [12]]),
        ((2, 2), [[6, 8], [6, 8], [10, 12]]),
        ((2, 3), [[7, 8], [7, 8], [11, 12]]),
        ((5, 4), [[12], [12], [12]]),
    ],
    ids=str,
)
def test_peaks_are_shared_by_what_shares_a_scale(group_size, peaks):
    found = float_grid.group_peaks(GRID, group_size)
    assert found.squeeze(-1).tolist() == peaks


def test_errors_of_rows_that_share_a_scale_add_up():
    errors = torch.tensor([[[1.0], [2]], [[3], [4]], [[5], [6]]])
    summed = float_grid.share_over_rows(errors, (2, 2), "sum").squeeze(-1)
    assert summed.tolist() == [[4, 6], [4, 6], [5, 6]]
    assert float_grid.share_over_rows(errors, 0, "sum").squeeze(-1).tolist() == [[21, 21]] * 3
    assert torch.equal(float_grid.share_over_rows(errors, 16, "sum"), errors)


@pytest.mark.parametrize(
    ("group_size", "scales"), [(-1, (3, 1)), (2, (3, 2)), (0, (1, 1)), ((2, 2), (2, 2)), ((2, 3), (2, 2))], ids=str
)
def test_there_is_one_clip_factor_for_each_scale(group_size, scales):
    params = float_grid.trainable(GRID, group_size)
    assert params["max_scale"].shape == (*scales, 1)
    params["max_scale"] = torch.arange(params["max_scale"].numel()).reshape(params["max_scale"].shape).float()
    factors = float_grid.clip_factors(params, 3, group_size)
    assert factors.shape[0] == 3
    if isinstance(group_size, tuple):
        assert torch.equal(factors[0], factors[1])
        assert not torch.equal(factors[1], factors[2])


def test_offsets_of_fp4_are_in_units_of_the_scale():
    # Scale 1: 4.5 lies between 4 and 6 (distance 2), 1.1 between 1 and 1.5, 0.2 between 0 and 0.5.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([4.5, 1.1, 0.2])
    scale = torch.ones(1, 1, 1)
    params = float_grid.trainable(weight, 32)
    for offset, expected in ((0.0, [4.0, 1.0, 0.0]), (0.49, [4.0, 1.5, 0.5]), (-0.49, [4.0, 0.5, -0.5])):
        params["rounding"].fill_(offset)
        assert float_grid.fake_quantize(weight, MXFP4, scale, params)[0, :3].tolist() == expected


def test_an_offset_of_half_a_step_of_fp8_is_half_the_local_distance():
    # 17 lies between 16 and 18 (distance 2), 1.05 between 1 and 1.125.
    scheme, weight = PRESET_SCHEMES["MXFP8"], torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([17.2, 1.05])
    params = float_grid.trainable(weight, 32)
    for offset, expected in ((0.0, [18.0, 1.0]), (0.49, [18.0, 1.125]), (-0.49, [16.0, 1.0])):
        params["rounding"].fill_(offset)
        assert float_grid.fake_quantize(weight, scheme, torch.ones(1, 1, 1), params)[0, :2].tolist() == expected


def test_the_straight_through_gradient_of_offset_and_scale_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([4.5, 1.1, 0.2, 9.0])  # the last one saturates at 6
    scale = torch.ones(1, 1, 1, requires_grad=True)
    params = float_grid.trainable(weight, 32)
    params["rounding"].requires_grad_()
    float_grid.fake_quantize(weight, MXFP4, scale, params)[0, :4].sum().backward()
    # d W_hat / d V = scale * unit inside, 0 beyond the largest number.
    assert params["rounding"].grad[0, 0, :4].tolist() == [1.0, 1.0, 1.0, 0.0]
    # d W_hat / d scale = level - W / scale inside (from scale * round(W / scale)), the level itself beyond.
    assert float(scale.grad) == pytest.approx((4 - 4.5) + (1 - 1.1) + (0 - 0.2) + 6, rel=1e-6)


def test_the_best_scale_is_the_first_of_the_best():
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 6.0, 3.0  # 3 is exact under both scales, 6 under the first only
    first, second = (torch.full((2, 1, 1), value) for value in (1.0, 0.5))
    assert float_grid.best_scale(weight, MXFP4, None, [first, second]).flatten().tolist() == [1.0, 1.0]
    assert float_grid.best_scale(weight, MXFP4, None, [second, first]).flatten().tolist() == [1.0, 0.5]


def test_channels_without_importance_do_not_count():
    weight = torch.tensor([[6.0, 0.7] + [0.0] * 30])
    candidates = [torch.full((1, 1, 1), value) for value in (1.0, 0.35)]
    kept = float_grid.best_scale(weight, MXFP4, None, candidates)
    ignored = float_grid.best_scale(weight, MXFP4, torch.tensor([0.0] + [1.0] * 31), candidates)
    assert (float(kept), float(ignored)) == (1.0, pytest.approx(0.35))


def test_a_block_takes_one_scale_for_all_its_rows():
    weight = torch.zeros(4, 32)
    weight[0, 0], weight[1, 0], weight[2, 0] = 6.0, 0.3, 0.3
    scheme = QuantizationScheme(data_type="fp", bits=8, group_size=(2, 32), scale_dtype="float32")
    candidates = [torch.full((4, 1, 1), value) for value in (1.0, 0.3)]
    best = float_grid.best_scale(weight, scheme, None, candidates).flatten()
    assert best[0] == best[1]
    assert best[2] == best[3]


def test_what_is_no_element_is_said():
    assert "bits=5 (only 4, 6, 8)" in float_grid.why_not_element(MXFP4.replace(bits=5))
    assert "sym=False" in float_grid.why_not_element(MXFP4.replace(sym=False))
    assert float_grid.why_not_element(MXFP4) is None
    assert float_grid.element_of(MXFP4) is E2M1
