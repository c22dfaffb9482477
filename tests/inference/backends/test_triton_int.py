"""The backend's layer around the kernels, on a CPU in Triton's interpreter; see ../test_triton_kernels.py."""

import dataclasses
import os

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, why_not
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

UP = LayerSpec(
    name="up",
    in_features=128,
    out_features=32,
    scheme=QuantizationScheme(bits=4, group_size=64, sym=False),
    layout="gptq",
    dtype=torch.float16,
    bias=True,
)

if os.environ.get("TRITON_INTERPRET") == "1":

    def exact(case, x):
        return F.linear(x.float(), case.weight, case.bias.float()).to(x.dtype)

    def test_a_compiled_layer_computes_the_same_whatever_the_number_of_tokens(make_case):
        case = make_case(UP, "triton").ready()
        compiled = torch.compile(case.layer, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            for tokens in (1, 3, 70):
                x = torch.randn(2, tokens, 128).half()
                torch.testing.assert_close(compiled(x), exact(case, x), rtol=1e-3, atol=1e-3)

    def test_the_operator_keeps_the_rules_of_operators(make_case):
        layer = make_case(UP, "triton").ready().layer
        arguments = torch.randn(3, 128).half(), layer.qweight, layer.kernel.grid, layer.bias, *layer.kernel.packing
        torch.library.opcheck(torch.ops.auto_round.packed_linear.default, arguments)

    @pytest.mark.parametrize(
        "x",
        [torch.randn(2, 128), torch.randn(2, 128).bfloat16().requires_grad_()],
        ids=["float32", "with a gradient"],
    )
    def test_calls_the_kernels_do_not_serve_are_dequantized_exactly(make_case, x):
        case = make_case(UP, "triton").ready()
        assert torch.equal(case.layer(x), F.linear(x, case.weight.to(x.dtype), case.bias.to(x.dtype)))

    def test_no_token_and_views_are_served(make_case):
        case = make_case(UP, "triton").ready()
        assert case.layer(torch.empty(2, 0, 128).half()).shape == (2, 0, 32)
        for x in (torch.randn(128, 3).half().t(), torch.randn(3 * 128 + 1).half()[1:].view(3, 128)):
            torch.testing.assert_close(case.layer(x), exact(case, x), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_groups_out_of_order_are_sorted(make_case, bits):
        scheme = QuantizationScheme(bits=bits, group_size=32, sym=False)
        spec = dataclasses.replace(UP, scheme=scheme, group_index=True, act_order=True)
        case = make_case(spec, "triton", shuffled=True).ready()
        x = torch.randn(2, 128).half()
        torch.testing.assert_close(case.layer(x), exact(case, x), rtol=1e-3, atol=1e-3)

    def test_scales_that_need_float32_are_rounded_to_the_activations_precision(make_case):
        case = make_case(UP, "triton")
        case.layer.scales = case.layer.scales.float() * (1 + 2**-13)
        x = torch.randn(2, 128).half()
        y = case.ready().layer(x)
        assert case.layer.scales.dtype == torch.float32
        torch.testing.assert_close(y, exact(case, x), rtol=2e-3, atol=1e-3)

    def test_the_checkpoint_s_tensors_are_all_that_is_saved(make_case):
        assert list(make_case(UP, "triton").ready().layer.state_dict()) == ["qweight", "qzeros", "scales", "bias"]

else:

    def test_layers_are_computed_in_the_interpreter(run_interpreted):
        pytest.importorskip("triton")
        assert run_interpreted(__file__) == 12


@pytest.mark.parametrize(
    ("bits", "group_size", "reason"),
    [(4, 24, "group_size=24 is no multiple of 16"), (3, 48, "group_size=48 is no multiple of 32")],
)
def test_groups_that_fill_no_slice_are_refused(bits, group_size, reason):
    scheme = QuantizationScheme(bits=bits, group_size=group_size)
    spec = dataclasses.replace(UP, device="cuda", scheme=scheme, in_features=96)
    assert reason in why_not(BACKENDS["triton"], spec)


def test_an_old_triton_is_refused_with_its_version(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert "needs triton 3.5 or later, here is 3.4.0" in why_not(
        BACKENDS["triton"], dataclasses.replace(UP, device="cuda")
    )
