import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tuning.fused_step import FusedWeight, fused_weight
from auto_round.tuning.tuned_weight import TunedWeight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_weight(scheme, width=96, device="cpu"):
    data_type = DATA_TYPES[scheme.data_type]
    weight = torch.randn(16, width, device=device)
    params = data_type.trainable(weight, scheme)
    return TunedWeight(weight, scheme, data_type, data_type.minmax_range(weight, scheme), params, None, 0.5)


def test_on_a_cpu_autograd_takes_the_steps():
    assert fused_weight(make_weight(QuantizationScheme(group_size=32)), torch.bfloat16) is None


@needs_gpu
@pytest.mark.parametrize(
    ("scheme", "width", "is_fused"),
    [
        (QuantizationScheme(group_size=32), 96, True),
        (QuantizationScheme(group_size=-1), 96, True),
        (QuantizationScheme(group_size=64), 96, False),  # the last group of a row is shorter
        (QuantizationScheme(group_size=0), 96, False),
        (PRESET_SCHEMES["MXFP4"], 96, False),
    ],
)
def test_what_a_kernel_exists_for(scheme, width, is_fused):
    pytest.importorskip("triton")
    found = fused_weight(make_weight(scheme, width, "cuda"), torch.bfloat16)
    assert isinstance(found, FusedWeight) == is_fused


@needs_gpu
@pytest.mark.parametrize("sym", [True, False])
def test_a_fused_step_on_a_gpu_gives_the_codes_of_autograd(sym):
    pytest.importorskip("triton")
    scheme = QuantizationScheme(bits=3, group_size=32, sym=sym)
    one, two = (make_weight(scheme, 4096, "cuda") for _ in range(2))
    two.weight.copy_(one.weight)
    two.range_ = one.range_
    fused = fused_weight(one, torch.float32)
    for _ in range(4):
        gradient = torch.randn_like(one.weight)
        fused.move(gradient, torch.ones((), device="cuda"), 0.1, 0.02)
        found = two.gradients(gradient)
        for name, tensor in two.params.items():
            tensor.sub_(found[name].sign() * (0.1 if name == "rounding" else 0.02))
        two.keep_in_bounds()
    assert torch.equal(fused.dequantized, one.dequantized())
    differing = (one.encoded().codes != two.encoded().codes).float().mean()
    assert differing < 1e-4  # a sum over a group whose sign hangs on its order
