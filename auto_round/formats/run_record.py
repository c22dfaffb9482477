"""What a checkpoint says of the run that made it: the options of calibration and tuning that are not defaults."""

from __future__ import annotations

from typing import Any

from auto_round.config import RunConfig
from auto_round.plan import Plan

# Values that need not be said in a checkpoint.
DEFAULTS = {
    "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": None, "minmax_lr": None, "nblocks": 1, "iters": 200,
    "gradient_accumulate_steps": 1, "seed": 42, "enable_quanted_input": True, "enable_alg_ext": False,
    "enable_minmax_tuning": True, "enable_norm_bias_tuning": False, "scale_dtype": "torch.float16",
}  # fmt: skip


def run_record(plan: Plan, config: RunConfig) -> dict[str, Any]:
    """Returns option -> value, in the words that the reference's checkpoints use."""
    tune = config.tune
    described: dict[str, Any] = {"iters": tune.iters, "nsamples": config.calib.nsamples, "seqlen": config.calib.seqlen}
    names = ("batch_size", "lr", "minmax_lr", "nblocks", "gradient_accumulate_steps", "seed", "enable_quanted_input")
    names += ("enable_alg_ext", "enable_minmax_tuning", "enable_norm_bias_tuning")
    described |= {name: getattr(tune, name) for name in names}
    described["scale_dtype"] = f"torch.{plan.base.scale_dtype}"
    return {name: value for name, value in described.items() if value not in (None, DEFAULTS[name])}
