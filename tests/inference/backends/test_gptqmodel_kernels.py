import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

pytest.importorskip("gptqmodel")


def spec_of(**fields):
    scheme = QuantizationScheme(bits=4, group_size=32, sym=False)
    base = {"name": "up", "in_features": 64, "out_features": 32, "scheme": scheme, "layout": "gptq", "bias": True}
    return LayerSpec(**{**base, "dtype": torch.float16, **fields})


def test_the_module_s_tensors_are_not_saved(make_case):
    layer = make_case(spec_of(), "gptqmodel:torch").ready().layer
    assert list(layer.state_dict()) == ["qweight", "qzeros", "scales", "bias"]
    assert not list(layer.parameters())


def test_a_zero_point_that_does_not_fit_is_refused(make_case):
    case = make_case(spec_of(), "gptqmodel:torch")
    case.layer.qzeros = torch.full_like(case.layer.qzeros, -1)  # stored 15, one less than the zero point
    with pytest.raises(UnsupportedError, match=r"up: gptqmodel cannot hold the zero point 16\. Use backend='torch'"):
        case.ready()


def test_zero_points_of_a_symmetric_layer_are_not_read(make_case):
    case = make_case(spec_of(scheme=QuantizationScheme(bits=4, group_size=32)), "gptqmodel:torch")
    case.layer.qzeros.zero_()
    x = torch.randn(3, 64).half()
    exact = x.float() @ case.weight.t() + case.bias.float()
    with torch.no_grad():
        torch.testing.assert_close(case.ready().layer(x).float(), exact, rtol=1e-2, atol=1e-2)
