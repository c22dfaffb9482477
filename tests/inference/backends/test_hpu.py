"""No Gaudi is at hand: what its operator is given is checked, by undoing it in plain PyTorch."""

import dataclasses

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

BASE = LayerSpec(
    name="up",
    in_features=64,
    out_features=24,
    scheme=QuantizationScheme(group_size=32, sym=False),
    layout="gptq",
    dtype=torch.bfloat16,
)


def unpacked(words):
    """Codes along the output, eight in a word, lowest bits first."""
    shifts = torch.arange(0, 32, 4)
    return ((words[..., None] >> shifts) & 15).flatten(1)


@pytest.mark.parametrize("layout", ["gptq", "gptq_zp", "awq"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_the_operator_is_given_codes_scales_and_zero_points_along_the_output(make_case, layout, sym):
    scheme = QuantizationScheme(group_size=32, sym=sym)
    case = make_case(dataclasses.replace(BASE, layout=layout, scheme=scheme), "hpu").ready()
    kernel = case.layer.kernel
    assert (kernel.words_IW.shape, kernel.zero_words_GW.shape) == ((64, 3), (2, 3))
    assert (kernel.words_IW.dtype, kernel.scale_GO.dtype) == (torch.int32, torch.bfloat16)
    codes, zero = unpacked(kernel.words_IW), unpacked(kernel.zero_words_GW).repeat_interleave(32, dim=0)
    weight = (codes - zero) * case.layer.scales.float().repeat_interleave(32, dim=0)
    assert torch.equal(weight.t(), case.weight)


def test_groups_out_of_order_are_sorted_and_found_again(make_case):
    case = make_case(dataclasses.replace(BASE, group_index=True, act_order=True), "hpu", shuffled=True)
    stored = case.layer.qweight.clone()
    kernel = case.ready().layer.kernel
    codes, zero = unpacked(kernel.words_IW), unpacked(kernel.zero_words_GW).repeat_interleave(32, dim=0)
    weight = (codes - zero) * case.layer.scales.float().repeat_interleave(32, dim=0)
    assert torch.equal(weight.t(), case.weight[:, kernel.order_I])
    assert torch.equal(case.layer.state_dict()["qweight"], stored)


def test_a_zero_point_of_sixteen_is_refused(make_case):
    case = make_case(BASE, "hpu")
    case.layer.qzeros.fill_(-1)
    with pytest.raises(UnsupportedError, match="up: zero points above 15"):
        case.ready()
