import dataclasses

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, why_not
from auto_round.inference.backends.torch_int8 import LEAST_ROWS_ON_CUDA, MOST_ONE_BY_ONE, integer_product
from auto_round.inference.layer import LayerSpec
from auto_round.inference.processor import has_int8_dot_product
from auto_round.schemes import PRESET_SCHEMES

INT8 = PRESET_SCHEMES["INT8_W8A8"]
SCHEMES = {
    "per token": INT8,
    "per tensor": INT8.replace(act_group_size=0),
    "static": INT8.replace(act_group_size=0, act_dynamic=False),
}
TOKENS = [1, 2, MOST_ONE_BY_ONE, MOST_ONE_BY_ONE + 1, LEAST_ROWS_ON_CUDA - 1, LEAST_ROWS_ON_CUDA, 40]

cpu_with_vnni = pytest.mark.skipif(not has_int8_dot_product(), reason="needs a CPU with VNNI")
cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [pytest.param("cpu", marks=cpu_with_vnni), pytest.param("cuda", marks=cuda)]


def case_of(make_case, scheme, dtype=torch.float32):
    fields = {"in_features": 96, "out_features": 64, "scheme": scheme, "layout": "ct_int8", "dtype": dtype}
    return make_case(LayerSpec(name="up", bias=True, **fields), "torch_int8").ready()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("device", DEVICES)
def test_products_are_exact(device, tokens):
    codes = torch.randint(-128, 128, (tokens, 1024), dtype=torch.int8)
    weight = torch.randint(-128, 128, (64, 1024), dtype=torch.int8)
    found = integer_product(codes.to(device), weight.to(device)).cpu()
    exact = codes.long() @ weight.t().long()
    # Sums below 2**24 are exact in float32.
    assert exact.abs().max() < 2**24
    assert torch.equal(found.long(), exact)
    assert found.is_contiguous()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_computes_what_its_quantized_input_and_weight_give(make_case, device, name, tokens):
    case = case_of(make_case, SCHEMES[name])
    x = torch.randn(tokens, 96)
    expected = F.linear(case.quantize_input(x), case.weight, case.bias)
    # The same numbers in another order of float32 operations; an input at a tie may round the other way.
    found = case.layer.to(device)(x.to(device)).cpu()
    assert (found - expected).abs().mean() < 1e-5 * expected.abs().mean()


@cpu_with_vnni
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_result_has_the_inputs_dtype_and_shape(make_case, dtype):
    case = case_of(make_case, INT8, dtype)
    for shape in ((2, 3, 96), (96,), (0, 96)):
        y = case.layer(torch.randn(shape, dtype=dtype))
        assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 64))


def test_the_gradient_reaches_the_input_as_if_it_were_not_quantized(make_case):
    case = case_of(make_case, INT8)
    x = torch.randn(3, 96, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.sum(0).expand(3, 96))


def test_a_machine_without_fast_integer_products_is_refused(monkeypatch):
    fields = {"in_features": 96, "out_features": 64, "scheme": INT8, "layout": "ct_int8"}
    spec = LayerSpec(name="up", **fields)
    monkeypatch.setattr("auto_round.inference.backends.torch_int8.has_int8_dot_product", lambda: False)
    assert why_not(BACKENDS["torch_int8"], spec) == "needs a processor with AVX512-VNNI"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    text = "needs an NVIDIA GPU of compute capability 7.5 or later"
    assert why_not(BACKENDS["torch_int8"], dataclasses.replace(spec, device="cuda")) == text
