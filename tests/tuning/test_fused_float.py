"""What launches add to the kernel, which test_triton_float_step.py tests by itself: whole runs of a block, and GPUs.

Tests of whole runs are collected only in the process that the one test outside of it starts.
"""

import os

import pytest
import torch

from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.schemes import PRESET_SCHEMES
from auto_round.tuning import sign_round, tuner_for
from auto_round.tuning.fused_float import LONGEST_RUN, FusedFloat
from auto_round.tuning.tuned_weight import Curvature, TunedWeight

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SCHEMES = ("MXFP4", "MXFP6", "MXFP8", "MXINT4", "MXINT8", "NVFP4", "FPW8A16", "FP8_BLOCK")
RUNS = [
    ("MXFP4", {}),
    ("MXFP8", {"enable_minmax_tuning": True, "enable_alg_ext": False}),
    ("NVFP4", {"enable_alg_ext": False}),
    ("FP8_BLOCK", {"enable_minmax_tuning": True}),
]


def make_weight(scheme, shape, device="cpu", *, curved=False):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng).to(device, torch.bfloat16)
    data_type = DATA_TYPES[scheme.data_type]
    factors = [torch.rand(size, generator=rng).to(device) for size in shape]
    params = data_type.trainable(weight, scheme)
    range_ = data_type.search_range(weight, scheme, None)
    return TunedWeight(weight, scheme, data_type, range_, params, Curvature(*factors) if curved else None, 0.5)


if IS_INTERPRETED:

    @pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
    def test_a_block_becomes_what_autograd_makes_of_it(name, options, make_task, monkeypatch):
        config = TuneConfig(iters=3, batch_size=4, **options)
        mine = tuner_for(config)(make_task(PRESET_SCHEMES[name]), config)
        monkeypatch.setattr(sign_round, "fused_weight", lambda *_: None)
        other = tuner_for(config)(make_task(PRESET_SCHEMES[name]), config)
        assert (mine.first_loss, mine.best_loss, mine.best_step) == (other.first_loss, other.best_loss, other.best_step)
        for weight, found in mine.weights.items():
            assert torch.equal(found.codes, other.weights[weight].codes)
            assert torch.equal(found.scale, other.weights[weight].scale)

else:

    def test_blocks_become_what_autograd_makes_of_them(run_interpreted):
        pytest.importorskip("triton")
        assert run_interpreted(__file__) >= len(RUNS)


@pytest.mark.parametrize(
    ("group_size", "width", "fits"),
    [
        (128, 300, True),
        (2 * LONGEST_RUN, 5 * LONGEST_RUN, True),
        (LONGEST_RUN + 44, 4 * LONGEST_RUN, False),  # a run would have weights of two groups
        (LONGEST_RUN + 44, LONGEST_RUN, True),
        (-1, 3 * LONGEST_RUN + 1, True),
        (0, 77, True),
        ((128, LONGEST_RUN), 4 * LONGEST_RUN, True),
    ],
)
def test_groups_are_whole_runs_or_end_with_the_row(group_size, width, fits):
    scheme = PRESET_SCHEMES["FPW8A16"].replace(group_size=group_size)
    assert FusedFloat.fits(make_weight(scheme, (2, width))) == fits


@needs_gpu
@pytest.mark.parametrize("curved", [False, True], ids=["plain", "curved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_steps_on_a_gpu_are_exactly_those_of_autograd(name, dtype, curved):
    pytest.importorskip("triton")
    one, two = (make_weight(PRESET_SCHEMES[name], (48, 4096), "cuda", curved=curved) for _ in range(2))
    fused = FusedFloat(one, dtype)
    for decay in (1.0, 0.7, 0.3):
        gradient, decay = torch.randn_like(one.weight, dtype=dtype), torch.tensor(decay, device="cuda")
        fused.move(gradient, decay, 0.13, 0.0, unit=0.3)
        found = two.gradients(gradient.float() * 0.3)
        two.params["rounding"].sub_(found["rounding"].sign() * (decay * 0.13))
        two.keep_in_bounds()
        assert torch.equal(one.params["rounding"], two.params["rounding"])
        assert torch.equal(fused.dequantized, two.dequantized().to(dtype))
