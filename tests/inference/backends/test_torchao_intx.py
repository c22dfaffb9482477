import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.layer import LayerSpec
from auto_round.schemes import QuantizationScheme

pytest.importorskip("torchao")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_the_weight_is_a_torchao_tensor_of_the_same_values(make_case, bits, sym):
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scheme = QuantizationScheme(bits=bits, group_size=32, sym=sym)
    case = make_case(LayerSpec(name="up", in_features=96, out_features=32, scheme=scheme, layout="gptq"), "torchao")
    weight = case.ready().layer.kernel.weight
    assert isinstance(weight, IntxUnpackedToInt8Tensor)
    assert torch.equal(weight.dequantize(), case.weight)


def test_a_layer_compiles_into_one_graph(make_case):
    scheme = QuantizationScheme(bits=4, group_size=32, sym=False)
    spec = LayerSpec(name="up", in_features=64, out_features=32, scheme=scheme, layout="awq", dtype=torch.bfloat16)
    case = make_case(spec, "torchao").ready()
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        y = torch.compile(case.layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, F.linear(x, case.weight.bfloat16()), rtol=2**-7, atol=1e-2)


def test_the_torchao_tensor_is_not_saved(make_case):
    spec = LayerSpec(
        name="up", in_features=64, out_features=32, scheme=QuantizationScheme(group_size=32), layout="gptq"
    )
    assert list(make_case(spec, "torchao").ready().layer.state_dict()) == ["qweight", "qzeros", "scales"]
