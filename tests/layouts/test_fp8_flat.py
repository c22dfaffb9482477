import pytest
import torch

from auto_round.layouts import LAYOUTS
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

LAYOUT = LAYOUTS["fp8_flat"]
STATIC = PRESET_SCHEMES["FP8_STATIC"]
CASES = {
    "per row": (STATIC, "weight_scale", (48,)),
    "per tensor": (STATIC.replace(group_size=0), "weight_scale", (1,)),
    "blocks": (PRESET_SCHEMES["FP8_BLOCK"].replace(group_size=(32, 40)), "weight_scale_inv", (2, 2)),
}


def random_weight(scheme: QuantizationScheme) -> QuantizedTensor:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 126, (48, 80), generator=rng).to(torch.uint8)
    rows = scheme.group_size[0] if isinstance(scheme.group_size, tuple) else 48 if scheme.group_size == 0 else 1
    scale = torch.randn(-(-48 // rows), group_count(80, scheme.group_size), generator=rng).abs().bfloat16().float()
    peak = torch.tensor(1.75) if scheme.activation.needs_calibration else None
    return QuantizedTensor(codes, scale.repeat_interleave(rows, dim=0)[:48], None, scheme, input_peak=peak)


@pytest.mark.parametrize("name", CASES)
def test_pack_then_unpack_is_identity(name):
    scheme, scale_name, shape = CASES[name]
    weight = random_weight(scheme)
    packed = LAYOUT.pack(weight)
    found = LAYOUT.unpack(packed, scheme, weight.shape)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scale, weight.scale)
    assert (found.input_peak is None) == (weight.input_peak is None)
    assert weight.input_peak is None or torch.equal(found.input_peak, weight.input_peak)
    specs = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in packed.items()}
    assert specs == LAYOUT.specs(scheme, weight.shape)
    assert specs[scale_name] == (shape, "bfloat16")
    assert specs["weight"] == ((48, 80), "float8_e4m3fn")


def test_integers_are_refused():
    assert "data_type=int" in LAYOUT.refuses(QuantizationScheme(bits=8), (32, 32))
