"""NVFP4 weights against values worked by hand and compressed_tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.nvfp4 import global_scale
from auto_round.elements import E4M3
from auto_round.schemes import PRESET_SCHEMES

NVFP4, SCHEME = DATA_TYPES["nv_fp"], PRESET_SCHEMES["NVFP4A16"]
ARGS = QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)


def random_weight(rows: int = 12, width: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.logspace(-1, 1, rows)[:, None]


def rounded(weight, peak=None):
    range_ = NVFP4.minmax_range(weight, SCHEME, peak)
    return NVFP4.encode(weight, SCHEME, range_, NVFP4.trainable(weight, SCHEME))


def test_by_hand():
    # Peak 42: global scale 2688 / 42 = 64. Group 1: 42 / 6 * 64 = 448. Group 2: peak 2.1, 22.4 becomes 22.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([42.0, -7.5, 1.0])
    weight[0, 16:18] = torch.tensor([2.1, -0.6])
    encoded = rounded(weight)
    assert encoded.global_scale == 64
    assert encoded.scale.tolist() == [[448.0, 22.0]]
    # Steps 7 and 0.34375: -7.5 is -1.07 steps, 1.0 is 0.14; 2.1 is 6.1 and saturates, -0.6 is -1.745.
    assert encoded.dequantize()[0, :3].tolist() == [42.0, -7.0, 0.0]
    assert encoded.dequantize()[0, 16:18].tolist() == [6 * 0.34375, -1.5 * 0.34375]
    assert encoded.codes[0, :3].tolist() == [7, 10, 0]


def test_plain_rounding_is_what_compressed_tensors_computes():
    weight = random_weight()
    encoded = rounded(weight)
    whole = generate_gparam(weight.amin(), weight.amax())
    assert torch.equal(encoded.global_scale.reshape(1), whole)
    grouped = weight.unflatten(1, (-1, 16))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), ARGS, global_scale=whole)
    assert torch.equal(encoded.scale, scale)
    assert torch.equal(encoded.dequantize(), fake_quantize(weight, scale, zero, ARGS, global_scale=whole))


def test_joined_weights_share_the_global_scale():
    weight = random_weight()
    encoded = rounded(weight, torch.tensor(1000.0))
    assert encoded.global_scale == pytest.approx(2.688)
    assert encoded.global_scale == global_scale(torch.tensor(1000.0))
    assert encoded.scale.max() < 448


def test_the_search_is_never_worse_than_the_peak():
    weight = random_weight(seed=5)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 3

    def error(range_):
        dense = NVFP4.fake_quantize(weight, SCHEME, range_, NVFP4.trainable(weight, SCHEME))
        return (importance * (dense - weight).square()).unflatten(1, (-1, 16)).sum(-1)

    plain = NVFP4.minmax_range(weight, SCHEME)
    searched = NVFP4.search_range(weight, SCHEME, importance)
    assert (error(searched) <= error(plain)).all()
    assert error(searched).sum() < 0.9 * error(plain).sum()
    assert torch.equal(E4M3.round(searched["scale"]), searched["scale"])
    assert torch.equal(searched["global_scale"], plain["global_scale"])


def test_stored_scales_stay_numbers_of_e4m3_within_its_range():
    weight = random_weight()
    weight[0, :16] = 0
    params = NVFP4.trainable(weight, SCHEME)
    range_ = NVFP4.minmax_range(weight, SCHEME)
    for factor in (0.5, 0.93, 1.5):
        params["max_scale"].fill_(factor)
        encoded = NVFP4.encode(weight, SCHEME, range_, params)
        assert torch.equal(encoded.scale.to(torch.float8_e4m3fn).float(), encoded.scale)
        assert encoded.scale.min() >= 2.0**-9
        assert encoded.scale.max() <= 448
        assert not encoded.dequantize()[0, :16].any()


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6, 1e20])
def test_weights_of_any_size_stay_finite(size):
    encoded = rounded(random_weight() * size)
    assert encoded.dequantize().isfinite().all()
    # FP4 under a scale of 4 significant bits: the peak of each row is kept to an eighth.
    weight = random_weight() * size
    kept = encoded.dequantize().abs().amax(1) / weight.abs().amax(1)
    assert (kept > 0.87).all()
    assert (kept < 1.13).all()


def test_a_tensor_of_zeros():
    encoded = rounded(torch.zeros(2, 32))
    assert encoded.global_scale == 1
    assert not encoded.dequantize().any()


def test_refusals_and_scale_bits():
    assert NVFP4.refuses(SCHEME) is None
    assert "group_size=32" in NVFP4.refuses(SCHEME.replace(group_size=32))
    assert "bits=8" in NVFP4.refuses(SCHEME.replace(bits=8))
    assert "sym=False" in NVFP4.refuses(SCHEME.replace(sym=False))
    assert NVFP4.scale_bits(SCHEME) == 8
