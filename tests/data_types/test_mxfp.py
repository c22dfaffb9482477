"""Microscaling weights against the arithmetic of the specification, worked by hand, and compressed_tensors."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.mxfp import covering_scale, rounded_scale, shared_scale
from auto_round.elements import E2M1, E4M3, E5M2, ELEMENTS, MXINT8
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

TYPES = [
    ("mx_fp", 4), ("mx_fp", 6), ("mx_fp", 8), ("mx_fp_e3m2", 6), ("mx_fp_e5m2", 8), ("mx_int", 4), ("mx_int", 8)
]  # fmt: skip


def scheme_of(data_type: str, bits: int) -> QuantizationScheme:
    return QuantizationScheme.from_dict({"data_type": data_type, "bits": bits})


def random_weight(rows: int = 12, width: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.logspace(-3, 1, rows)[:, None]


def rounded(weight, scheme):
    data_type = DATA_TYPES[scheme.data_type]
    range_ = data_type.minmax_range(weight, scheme)
    return data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))


def test_mxfp4_by_hand():
    # Peak 7: floor(log2 7) - 2 = 0, scale 1, and 7 saturates at 6. 2.5 is a tie of 2 and 3; 0.2 is nearer to 0.
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([7.0, -2.5, 0.2, 0.3])
    weight[0, 32:34] = torch.tensor([0.11, 0.06])  # peak 0.11: floor(log2) = -4, scale 2**-6
    encoded = rounded(weight, scheme_of("mx_fp", 4))
    assert encoded.scale.tolist() == [[1.0, 2.0**-6]]
    assert encoded.dequantize()[0, :4].tolist() == [6.0, -2.0, 0.0, 0.5]
    assert encoded.dequantize()[0, 32:34].tolist() == [6 * 2.0**-6, 4 * 2.0**-6]
    assert encoded.codes[0, :4].tolist() == [7, 8 + 4, 0, 1]


def test_mxint8_by_hand():
    # Peak 1.99: scale 1, units of 1/64; 0.02 is 1.28 units.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([1.99, -1.0, 0.02])
    assert rounded(weight, scheme_of("mx_int", 8)).dequantize()[0, :3].tolist() == [127 / 64, -1.0, 1 / 64]


@pytest.mark.parametrize(("data_type", "bits"), TYPES)
def test_the_scale_is_the_specifications(data_type, bits):
    weight, scheme = random_weight(), scheme_of(data_type, bits)
    peaks = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    exponent = torch.floor(torch.log2(peaks.double())) - ELEMENTS[data_type, bits].max_exponent
    assert torch.equal(rounded(weight, scheme).scale.double(), 2.0**exponent)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_rounding_is_what_compressed_tensors_computes(bits):
    weight, scheme = random_weight(), scheme_of("mx_fp", bits)
    encoded = rounded(weight, scheme)
    args = QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32)
    expected = fake_quantize(weight, encoded.scale, torch.zeros_like(encoded.scale), args)
    assert torch.equal(encoded.dequantize(), expected)


@pytest.mark.parametrize(("data_type", "bits"), TYPES)
def test_the_search_is_never_worse_than_the_specification(data_type, bits):
    weight, scheme = random_weight(seed=2), scheme_of(data_type, bits)
    kind = DATA_TYPES[data_type]
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)) ** 3

    def error(range_):
        dense = kind.fake_quantize(weight, scheme, range_, kind.trainable(weight, scheme))
        return (importance * (dense - weight).square()).unflatten(1, (-1, 32)).sum(-1)

    plain, searched = kind.minmax_range(weight, scheme), kind.search_range(weight, scheme, importance)
    assert (error(searched) <= error(plain)).all()
    assert set((searched["scale"] / plain["scale"]).unique().tolist()) <= {0.5, 1.0, 2.0}


def test_a_clip_factor_moves_the_exponent_where_it_crosses_half_of_one():
    weight, scheme = random_weight(), scheme_of("mx_fp", 4)
    kind = DATA_TYPES["mx_fp"]
    range_, params = kind.minmax_range(weight, scheme), kind.trainable(weight, scheme)
    before = kind.encode(weight, scheme, range_, params).scale
    for factor, times in ((0.72, 1.0), (0.70, 0.5), (1.41, 1.0), (1.42, 2.0)):  # 2**-0.5 = 0.707, 2**0.5 = 1.414
        params["max_scale"].fill_(factor)
        assert torch.equal(kind.encode(weight, scheme, range_, params).scale, before * times)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e38])
def test_weights_of_any_size_stay_finite(size):
    weight = random_weight() / 30 * size
    for data_type, bits in TYPES:
        encoded = rounded(weight, scheme_of(data_type, bits))
        assert encoded.dequantize().isfinite().all()
        assert (encoded.scale >= 2.0**-126).all()


def test_groups_of_zeros_get_the_least_scale():
    encoded = rounded(torch.zeros(2, 32), scheme_of("mx_fp", 4))
    assert (encoded.scale == 2.0**-126).all()
    assert not encoded.dequantize().any()


@pytest.mark.parametrize(
    ("peak", "spec", "nearer", "covering"),
    [
        (4.0, 1, 1, 1),
        (6.0, 1, 1, 1),
        (6.5, 1, 1, 2),
        (7.0, 1, 2, 2),
        (7.9, 1, 2, 2),
        (8.0, 2, 2, 2),
        (3.0, 0.5, 0.5, 0.5),
    ],
)
def test_three_ways_to_choose_the_scale_of_fp4(peak, spec, nearer, covering):
    peak = torch.tensor(peak)
    assert (shared_scale(peak, E2M1), rounded_scale(peak, E2M1), covering_scale(peak, E2M1)) == (spec, nearer, covering)


@pytest.mark.parametrize(("peak", "spec", "nearer", "covering"), [(447.0, 1, 1, 1), (448.0, 1, 2, 1), (449.0, 1, 2, 2)])
def test_three_ways_to_choose_the_scale_of_fp8(peak, spec, nearer, covering):
    peak = torch.tensor(peak)
    assert (shared_scale(peak, E4M3), rounded_scale(peak, E4M3), covering_scale(peak, E4M3)) == (spec, nearer, covering)


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2, MXINT8], ids=lambda element: element.name)
def test_the_covering_scale_is_the_least_that_covers(element):
    peaks = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 100 + 1e-3
    scale = covering_scale(peaks, element)
    assert (peaks <= scale * element.largest).all()
    assert (peaks > scale / 2 * element.largest).all()


def test_refusals_and_scale_bits():
    kind = DATA_TYPES["mx_fp"]
    assert kind.refuses(PRESET_SCHEMES["MXFP4"]) is None
    assert "group_size=64" in kind.refuses(PRESET_SCHEMES["MXFP4"].replace(group_size=64))
    assert "bits=5" in kind.refuses(PRESET_SCHEMES["MXFP4"].replace(bits=5))
    assert "sym=False" in kind.refuses(PRESET_SCHEMES["MXFP4"].replace(sym=False))
    assert kind.scale_bits(PRESET_SCHEMES["MXFP4"]) == 8
    assert math.isclose(2.0**-126, torch.finfo(torch.float32).tiny)
