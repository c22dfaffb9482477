import pytest
import torch

from auto_round.inference.dequantize import CPU_CHUNK, RowKernel, chunks, dequantized
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.inference.packing import DENSE
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

CASES = {
    "fp8 per row": ("fp8", PRESET_SCHEMES["FPW8A16"]),
    "fp8 per tensor": ("fp8", PRESET_SCHEMES["FPW8A16"].replace(group_size=0)),
    "fp8 blocks": ("fp8", PRESET_SCHEMES["FPW8A16"].replace(group_size=(48, 64))),
    "fp8 flat": ("fp8_flat", PRESET_SCHEMES["FPW8A16"]),
    "fp8 flat blocks": ("fp8_flat", PRESET_SCHEMES["FPW8A16"].replace(group_size=(48, 64))),
    "fp8 e5m2": ("fp8", PRESET_SCHEMES["FPW8A16"].replace(data_type="fp_e5m2")),
    "mxfp4": ("mxfp4", PRESET_SCHEMES["MXFP4A16"]),
    "mxfp8": ("mxfp8", PRESET_SCHEMES["MXFP8"]),
    "mxint4": ("mxint4", PRESET_SCHEMES["MXINT4"]),
    "nvfp4": ("nvfp4", PRESET_SCHEMES["NVFP4A16"]),
    "int8": ("ct_int8", PRESET_SCHEMES["INT8_W8A8"]),
    "int8 groups": ("ct_int8", QuantizationScheme(bits=8, group_size=32)),
    "int4": ("ct_packed", QuantizationScheme(group_size=32)),
    "int3": ("ct_packed", QuantizationScheme(bits=3, group_size=-1)),
    "int2 asymmetric": ("ct_packed", QuantizationScheme(bits=2, group_size=32, sym=False)),
    "int3 asymmetric": ("ct_packed", QuantizationScheme(bits=3, group_size=32, sym=False)),
}


def layer_of(make_case, name, shape, **fields):
    layout, scheme = CASES[name]
    spec = LayerSpec(name="up", in_features=shape[1], out_features=shape[0], scheme=scheme, layout=layout, **fields)
    return make_case(spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (43, 160)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_the_layout_stands_for(make_case, name, shape, dtype):
    case = layer_of(make_case, name, shape)
    case.layer.settle()
    assert torch.equal(dequantized(case.layer, slice(0, shape[0]), dtype), case.weight.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_same_in_one_chunk_and_in_many(make_case, monkeypatch, name):
    case = layer_of(make_case, name, (100, 64), bias=True)
    case.layer.settle()
    x = torch.randn(3, 64)
    assert CPU_CHUNK > 100 * 64
    whole = RowKernel()(case.layer, x)
    monkeypatch.setattr("auto_round.inference.dequantize.CPU_CHUNK", 40 * 64)
    parts = [dequantized(case.layer, rows, torch.float32) for rows in chunks(case.layer)]
    assert [len(part) for part in parts] == [32, 32, 32, 4]
    assert torch.equal(torch.cat(parts), case.weight)
    torch.testing.assert_close(RowKernel()(case.layer, x), whole, rtol=1e-5, atol=1e-5)


def test_dense_weights_are_taken_as_they_are():
    spec = LayerSpec(
        name="up", in_features=8, out_features=4, scheme=QuantizationScheme(), layout=DENSE, dtype=torch.bfloat16
    )
    layer = QuantizedLinear(spec, torch.nn.Identity)
    layer.weight.normal_()
    layer.settle()
    assert list(chunks(layer)) == [slice(0, 4)]
    assert torch.equal(dequantized(layer, slice(0, 4), torch.bfloat16), layer.weight)
    assert layer.to(torch.float32).weight.dtype == torch.float32
