import pytest

from auto_round.config import RunConfig
from auto_round.formats.run_record import run_record
from auto_round.models import discover
from auto_round.plan import resolve


@pytest.mark.parametrize(
    ("options", "record"),
    [
        ({}, {}),
        ({"iters": 7, "lr": 0.01, "seqlen": 64}, {"iters": 7, "lr": 0.01, "seqlen": 64}),
        ({"scale_dtype": "bf16", "enable_alg_ext": True}, {"scale_dtype": "torch.bfloat16", "enable_alg_ext": True}),
        ({"iters": 200, "nsamples": 128, "seed": 42}, {}),
    ],
    ids=["defaults", "tuning", "scales", "said-defaults"],
)
def test_only_options_that_are_not_defaults_are_told(make_model, options, record):
    config = RunConfig.from_options(**options)
    assert run_record(resolve(discover(make_model()), config.scheme), config) == record
