import pytest
import torch

from auto_round.quality import errors_of_weights
from auto_round.quality.errors_of_weights import weight_error
from auto_round.schemes import QuantizationScheme
from auto_round.tuning import round_plain

CPU = torch.device("cpu")
SCHEMES = {
    "int": QuantizationScheme(bits=3, group_size=32, sym=False),
    "mxfp": QuantizationScheme(bits=4, group_size=32, data_type="mx_fp"),
    "superblocks": QuantizationScheme(
        bits=4, group_size=32, sym=False, data_type="int_dq", super_bits=6, super_group_size=8
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("at_a_time", [256, 1 << 24], ids=["by rows", "whole"])
def test_errors_are_ratios_of_sums_of_squares(scheme, at_a_time, monkeypatch):
    monkeypatch.setattr(errors_of_weights, "VALUES_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 256, generator=generator)
    means = torch.rand(256, generator=generator)
    quantized = round_plain(weight, scheme)
    lost, there = (weight - quantized.dequantize()).double().square(), weight.double().square()
    found = weight_error(weight, quantized, CPU, means)
    assert found.weight == pytest.approx(float(lost.sum() / there.sum()), rel=1e-5)
    assert found.weighted == pytest.approx(float((lost * means).sum() / (there * means).sum()), rel=1e-5)


def test_without_inputs_there_is_no_weighted_error():
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    assert weight_error(weight, round_plain(weight, SCHEMES["int"]), CPU).weighted is None


def test_a_weight_of_zeros_loses_nothing():
    weight = torch.zeros(2, 32)
    assert weight_error(weight, round_plain(weight, SCHEMES["int"]), CPU).weight == 0
