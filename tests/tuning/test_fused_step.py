import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.float_grid import FloatDataType
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tuning.fused_float import FusedFloat
from auto_round.tuning.fused_int import FusedInt
from auto_round.tuning.fused_step import FUSED_WEIGHTS, fused_weight
from auto_round.tuning.tuned_weight import TunedWeight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_weight(scheme, width=96, device="cpu"):
    data_type = DATA_TYPES[scheme.data_type]
    weight = torch.randn(16, width, device=device)
    params = data_type.trainable(weight, scheme)
    return TunedWeight(weight, scheme, data_type, data_type.minmax_range(weight, scheme), params, None, 0.5)


@pytest.mark.parametrize("scheme", [QuantizationScheme(group_size=32), PRESET_SCHEMES["MXFP4"]], ids=str)
def test_on_a_cpu_autograd_takes_the_steps(scheme):
    assert fused_weight(make_weight(scheme), torch.bfloat16) is None


def test_a_kernel_is_known_for_integers_and_for_every_type_with_float_elements():
    floats = {name for name, data_type in DATA_TYPES.items() if isinstance(data_type, FloatDataType)}
    assert dict(FUSED_WEIGHTS.items()) == dict.fromkeys(floats, FusedFloat) | {"int": FusedInt}


@needs_gpu
@pytest.mark.parametrize(
    ("scheme", "width", "kind"),
    [
        (QuantizationScheme(group_size=32), 96, FusedInt),
        (QuantizationScheme(group_size=-1), 96, FusedInt),
        (QuantizationScheme(group_size=64), 96, type(None)),  # the last group of a row is shorter
        (QuantizationScheme(group_size=0), 96, type(None)),
        (PRESET_SCHEMES["GGUF:Q4_K"], 256, type(None)),
        (PRESET_SCHEMES["MXFP4"], 96, FusedFloat),
        (PRESET_SCHEMES["NVFP4"], 100, FusedFloat),
        (PRESET_SCHEMES["FP8_BLOCK"], 384, FusedFloat),
    ],
    ids=str,
)
def test_what_a_kernel_exists_for(scheme, width, kind):
    pytest.importorskip("triton")
    assert type(fused_weight(make_weight(scheme, width, "cuda"), torch.bfloat16)) is kind
