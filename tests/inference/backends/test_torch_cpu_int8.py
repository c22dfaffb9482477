import dataclasses

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import torch_cpu_int8
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

BASE = LayerSpec(
    name="up",
    in_features=512,
    out_features=200,
    scheme=QuantizationScheme(bits=8, group_size=32, sym=False),
    layout="gptq",
    dtype=torch.bfloat16,
    bias=True,
)


@pytest.fixture
def make_layer(make_case):
    def make(spec=BASE, **options):
        return make_case(spec, "torch_cpu_int8", **options).ready()

    return make


def relative_error(case, x):
    exact = F.linear(x.float(), case.weight, case.bias.float())
    return float((case.layer(x).float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_any_number_of_tokens_is_computed(make_layer, group_size, sym):
    case = make_layer(dataclasses.replace(BASE, scheme=QuantizationScheme(bits=8, group_size=group_size, sym=sym)))
    for tokens, bound in ((1, 0.006), (4, 0.006), (40, 0.01), (300, 0.01)):
        # Scales and sums rounded to bfloat16; for many tokens activations to 8 bits: 0.0065.
        assert relative_error(case, torch.randn(tokens, 512).bfloat16()) < bound, tokens


@pytest.mark.parametrize("layout", ["gptq", "gptq_zp"])
def test_many_tokens_of_each_layout_are_computed_in_float16_too(make_layer, layout):
    case = make_layer(dataclasses.replace(BASE, layout=layout, dtype=torch.float16))
    assert relative_error(case, torch.randn(20, 512, dtype=torch.float16)) < 0.01


def test_groups_out_of_order_are_computed(make_layer):
    case = make_layer(dataclasses.replace(BASE, group_index=True, act_order=True), shuffled=True)
    for tokens in (2, 20):
        assert relative_error(case, torch.randn(tokens, 512).bfloat16()) < 0.01


@pytest.mark.parametrize("x", [torch.randn(20, 512), torch.randn(0, 512).bfloat16()], ids=["float32", "no token"])
def test_calls_that_nothing_faster_serves_use_the_exact_weight(make_layer, x):
    case = make_layer()
    y = case.layer(x)
    assert (y.shape, y.dtype) == ((x.shape[0], 200), x.dtype)
    torch.testing.assert_close(y, F.linear(x, case.weight.to(x.dtype), case.bias.to(x.dtype)))


def test_without_vnni_many_tokens_use_the_exact_weight(make_layer, monkeypatch):
    monkeypatch.setattr(torch_cpu_int8, "has_int8_dot_product", lambda: False)
    assert relative_error(make_layer(), torch.randn(20, 512).bfloat16()) < 0.006


def test_rows_are_dequantized_in_chunks_that_change_nothing(make_layer, monkeypatch):
    case = make_layer()
    x = torch.randn(3, 512)
    whole = case.layer(x)
    monkeypatch.setattr(torch_cpu_int8, "CHUNK", 512 * 7)
    monkeypatch.setattr(torch_cpu_int8, "ROWS", 64)
    torch.testing.assert_close(case.layer(x), whole)


def test_gradients_reach_the_input(make_layer):
    case = make_layer()
    x = torch.randn(3, 512, dtype=torch.bfloat16, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.bfloat16().sum(0).expand(3, 512), rtol=2**-6, atol=1e-2)


def test_the_weight_is_held_once(make_layer):
    layer = make_layer().layer
    assert layer.qweight.nbytes == 0
    assert layer.kernel.signed_GOK.nbytes == 512 * 200
