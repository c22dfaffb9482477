"""Against the library itself; skipped where auto-round-lib is not installed, but for what needs no library."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, ark
from auto_round.inference.backends.ark import ArkKernel, ArkWeightKernel
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

BASE = LayerSpec(
    name="up",
    in_features=256,
    out_features=96,
    scheme=QuantizationScheme(group_size=32, sym=False),
    layout="gptq",
    bias=True,
)


@pytest.fixture
def make_layer(make_case):
    pytest.importorskip("auto_round_kernel", exc_type=ImportError)

    def make(spec=BASE, **options):
        return make_case(spec, "ark", **options)

    return make


@pytest.mark.parametrize(("is_intel", "priority"), [(True, 5), (False, 1)])
def test_it_is_preferred_only_where_it_has_eight_bit_kernels(monkeypatch, is_intel, priority):
    monkeypatch.setattr(ark, "is_intel_with_vnni", lambda: is_intel)
    assert BACKENDS["ark"].rank() == priority


def test_intel_gpus_have_a_declaration_of_their_own():
    assert BACKENDS["ark_xpu"].devices == {"xpu"}
    assert BACKENDS["ark_xpu"].sym == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_any_number_of_tokens_is_computed(make_layer, dtype, bits, sym):
    scheme = QuantizationScheme(bits=bits, group_size=64, sym=sym)
    case = make_layer(dataclasses.replace(BASE, scheme=scheme, dtype=dtype)).ready()
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 256).to(dtype)
        exact = F.linear(x.float(), case.weight, case.bias.float())
        # Exact in float32; else activations may be rounded to 8 bits (0.006), and the result to 16.
        bound = 1e-6 if dtype == torch.float32 else 0.01
        assert float((case.layer(x).float() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_found_again(make_layer, bits, shuffled):
    scheme = QuantizationScheme(bits=bits, group_size=32, sym=False)
    spec = dataclasses.replace(BASE, scheme=scheme, group_index=shuffled, act_order=shuffled)
    case = make_layer(spec, shuffled=shuffled)
    stored = case.layer.qweight.clone()
    layer = case.ready().layer
    assert isinstance(layer.kernel, ArkWeightKernel)
    assert layer.qweight.numel() == 0
    assert torch.equal(layer.state_dict()["qweight"], stored)


def test_scales_that_cannot_give_codes_back_leave_the_weight_with_the_layer(make_layer):
    case = make_layer()
    case.layer.scales[0, 0] = 0
    stored = case.layer.qweight.clone()
    layer = case.ready().layer
    assert type(layer.kernel) is ArkKernel
    assert torch.equal(layer.qweight, stored)


def test_no_token_and_gradients_are_computed(make_layer):
    case = make_layer().ready()
    assert case.layer(torch.randn(2, 0, 256)).shape == (2, 0, 96)
    x = torch.randn(3, 256, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.sum(0).expand(3, 256), rtol=1e-4, atol=1e-5)
