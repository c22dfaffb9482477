import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, why_not
from auto_round.inference.backends.torch_fp8 import CAPABILITY, quantize_to_fp8
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import PRESET_SCHEMES

SCHEMES = {
    "per token": PRESET_SCHEMES["FP8_DYNAMIC"],
    "per tensor": PRESET_SCHEMES["FP8_DYNAMIC"].replace(act_group_size=0),
    "static": PRESET_SCHEMES["FP8_STATIC"],
    "one weight scale": PRESET_SCHEMES["FP8_STATIC"].replace(group_size=0),
}


def case_of(make_case, name, dtype=torch.float32, layout="fp8"):
    fields = {"in_features": 96, "out_features": 64, "scheme": SCHEMES[name], "layout": layout, "dtype": dtype}
    return make_case(LayerSpec(name="up", bias=True, **fields), "torch_fp8").ready()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_times_scale_are_the_quantized_input(make_case, name, dtype):
    case = case_of(make_case, name, dtype)
    x = torch.randn(5, 96).to(dtype).float()
    codes, scale = quantize_to_fp8(x, case.layer)
    assert (codes.dtype, scale.shape) == (torch.float8_e4m3fn, (5, 1))
    assert torch.equal(codes.float() * scale, case.quantize_input(x))


def test_a_token_of_zeros_stays_zeros(make_case):
    codes, scale = quantize_to_fp8(torch.zeros(2, 96), case_of(make_case, "per token").layer)
    assert not codes.float().any()
    assert scale.isfinite().all()


def test_gradients_and_empty_batches_go_through_plain_pytorch(make_case):
    case = case_of(make_case, "static")
    x = torch.randn(3, 96, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.sum(0).expand(3, 96))
    assert case.layer(torch.randn(0, 96)).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY, reason="needs a GPU with FP8"
)
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", sorted(BACKENDS["torch_fp8"].layouts))
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_computes_what_its_quantized_input_and_weight_give(make_case, name, layout, dtype, tokens):
    case = case_of(make_case, name, dtype, layout)
    x = torch.randn(tokens, 96).to(dtype)
    expected = F.linear(case.quantize_input(x.float()), case.weight, case.bias.float())
    found = case.layer.cuda()(x.cuda()).cpu()
    assert found.dtype == dtype
    # One rounding to the dtype of sums of 96 products, which the tensor cores add with about 13 bits behind the point:
    # an H200 was off by more than 2**-12.
    tolerance = max(torch.finfo(dtype).eps, 2.0**-11)
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_gpus_without_fp8_are_refused(monkeypatch):
    fields = {"in_features": 96, "out_features": 64, "scheme": SCHEMES["static"], "layout": "fp8", "device": "cuda"}
    spec = LayerSpec(name="up", **fields)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, is_refused in {(8, 6): True, (8, 9): False, (9, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        reason = why_not(BACKENDS["torch_fp8"], spec)
        assert reason == ("needs an NVIDIA GPU of compute capability 8.9 or later" if is_refused else None)
