import pytest
import torch

from auto_round.data_types.activations import quantize_activation
from auto_round.inference.input_quantization import QuantizedInput, calibrated_peak, why_no_range
from auto_round.inference.layer import LayerSpec
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

INT8_STATIC = PRESET_SCHEMES["INT8_W8A8"].replace(act_group_size=0, act_dynamic=False)


def spec_of(scheme, layout):
    return LayerSpec(name="up", in_features=64, out_features=32, scheme=scheme, layout=layout)


@pytest.mark.parametrize(
    ("scheme", "layout", "tensor", "value", "peak"),
    [
        (PRESET_SCHEMES["FP8_STATIC"], "fp8", "input_scale", 0.25, 112.0),
        (PRESET_SCHEMES["FP8_STATIC"], "fp8_flat", "input_scale", 0.25, 112.0),
        (INT8_STATIC, "ct_int8", "input_scale", 0.25, 31.75),
        (PRESET_SCHEMES["NVFP4"], "nvfp4", "input_global_scale", 8.0, 336.0),
    ],
)
def test_the_calibrated_peak_is_what_the_stored_scale_stands_for(make_case, scheme, layout, tensor, value, peak):
    layer = make_case(spec_of(scheme, layout)).layer
    setattr(layer, tensor, torch.tensor([value]))
    assert calibrated_peak(layer) == torch.tensor(peak)


def test_ranges_computed_at_run_time_have_no_peak(make_case):
    assert calibrated_peak(make_case(spec_of(PRESET_SCHEMES["MXFP4"], "mxfp4")).layer) is None
    assert calibrated_peak(make_case(spec_of(QuantizationScheme(), "gptq")).layer) is None


def test_the_input_passes_through_quantization_before_the_kernel(make_case):
    case = make_case(spec_of(PRESET_SCHEMES["FP8_STATIC"], "fp8"))
    kernel = torch.nn.Module()
    kernel.forward = lambda *inputs: inputs
    x = torch.randn(3, 64)
    layer, quantized = QuantizedInput(kernel)(case.layer, x)
    assert layer is case.layer
    assert torch.equal(quantized, quantize_activation(x, PRESET_SCHEMES["FP8_STATIC"].activation, torch.tensor(1.75)))


def test_a_range_that_the_layout_does_not_store_is_missed():
    assert why_no_range(spec_of(INT8_STATIC, "ct_int8")) is None
    assert why_no_range(spec_of(PRESET_SCHEMES["INT8_W8A8"], "gptq")) is None
    assert why_no_range(spec_of(INT8_STATIC, "gptq")) == "calibrated ranges of activations (int8 per tensor static)"
