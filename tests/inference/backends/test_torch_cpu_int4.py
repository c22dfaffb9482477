import dataclasses

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import torch_cpu_int4
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

BASE = LayerSpec(
    name="up",
    in_features=512,
    out_features=208,
    scheme=QuantizationScheme(group_size=32, sym=False),
    layout="gptq",
    dtype=torch.bfloat16,
    bias=True,
)


@pytest.fixture
def make_layer(make_case):
    def make(spec=BASE, **options):
        return make_case(spec, "torch_cpu_int4", **options).ready()

    return make


def relative_error(case, x):
    exact = F.linear(x.float(), case.weight, case.bias.float())
    return float((case.layer(x).float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_any_number_of_tokens_is_computed(make_layer, bits, group_size, sym):
    case = make_layer(dataclasses.replace(BASE, scheme=QuantizationScheme(bits=bits, group_size=group_size, sym=sym)))
    for tokens, bound in ((1, 0.006), (4, 0.006), (40, 0.01), (300, 0.01)):
        # Weights, scales and sums rounded to bfloat16; for many tokens also activations to 8 bits: 0.0065.
        assert relative_error(case, torch.randn(tokens, 512).bfloat16()) < bound, tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["gptq", "gptq_zp", "awq"])
def test_many_tokens_of_each_layout_and_dtype_are_computed(make_layer, layout, dtype):
    case = make_layer(dataclasses.replace(BASE, layout=layout, dtype=dtype))
    assert relative_error(case, torch.randn(20, 512, dtype=dtype)) < 0.01


def test_groups_out_of_order_are_computed_for_many_tokens(make_layer):
    case = make_layer(dataclasses.replace(BASE, group_index=True, act_order=True), shuffled=True)
    assert relative_error(case, torch.randn(20, 512).bfloat16()) < 0.01


@pytest.mark.parametrize(
    "x",
    [torch.randn(20, 512), torch.randn(3, 512, dtype=torch.float64), torch.randn(0, 512).bfloat16()],
    ids=["float32", "float64", "no token"],
)
def test_calls_that_nothing_faster_serves_use_the_exact_weight(make_layer, x):
    case = make_layer()
    y = case.layer(x)
    assert (y.shape, y.dtype) == ((x.shape[0], 208), x.dtype)
    torch.testing.assert_close(y, F.linear(x, case.weight.to(x.dtype), case.bias.to(x.dtype)))


@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients_reach_the_input(make_layer, tokens):
    case = make_layer()
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.bfloat16().sum(0).expand(tokens, 512), rtol=2**-6, atol=1e-2)


def test_without_vnni_many_tokens_use_the_exact_weight(make_layer, monkeypatch):
    monkeypatch.setattr(torch_cpu_int4, "has_int8_dot_product", lambda: False)
    case = make_layer()
    for tokens in (20, 40):
        x = torch.randn(tokens, 512).bfloat16()
        assert relative_error(case, x) < 0.006


def test_the_weight_is_held_twice_at_four_bits_and_no_third_time(make_layer):
    case = make_layer(dataclasses.replace(BASE, scheme=QuantizationScheme(group_size=128), bias=False))
    held = {name: buffer.nbytes for name, buffer in case.layer.kernel.named_buffers() if buffer.dtype == torch.uint8}
    assert held == {"packed": 512 * 208 // 2, "nibbles": 512 * 208 // 2}
    assert case.layer.qweight.nbytes == 0
