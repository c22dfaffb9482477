"""What a kernel's launches add to it. The kernel itself is tested in test_triton_step.py, without a GPU."""

import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.fused_int import MAX_GROUP, FusedInt
from auto_round.tuning.tuned_weight import TunedWeight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_weight(scheme, shape=(16, 96), device="cpu"):
    data_type = DATA_TYPES["int"]
    weight = torch.randn(shape, device=device)
    params = data_type.trainable(weight, scheme)
    return TunedWeight(weight, scheme, data_type, data_type.minmax_range(weight, scheme), params, None, 0.5)


@pytest.mark.parametrize(
    ("group_size", "width", "fits"),
    [(32, 96, True), (-1, 100, True), (64, 96, False), (0, 96, False), (-1, 2 * MAX_GROUP, False)],
)
def test_groups_have_to_fill_rows_and_fit_in_a_program(group_size, width, fits):
    assert FusedInt.fits(make_weight(QuantizationScheme(group_size=group_size), (2, width))) == fits


@needs_gpu
@pytest.mark.parametrize("sym", [True, False])
def test_a_fused_step_on_a_gpu_gives_the_codes_of_autograd(sym):
    pytest.importorskip("triton")
    scheme = QuantizationScheme(bits=3, group_size=32, sym=sym)
    one, two = (make_weight(scheme, (16, 4096), "cuda") for _ in range(2))
    two.weight.copy_(one.weight)
    two.range_ = one.range_
    fused = FusedInt(one, torch.float32)
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
