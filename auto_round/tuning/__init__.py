"""Tuners: functions from a block and its inputs to quantized weights."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from auto_round.config import TuneConfig
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import BlockResult
from auto_round.tuning import fused_float as _fused_float  # noqa: F401
from auto_round.tuning import fused_int as _fused_int  # noqa: F401
from auto_round.tuning.activations import (
    calibrated_peaks,
    input_quantizers,
    quantizers_of,
    with_input_quantizers,
    with_peaks,
)
from auto_round.tuning.base import Tuner, TuningTask
from auto_round.tuning.rtn import PlainRounding, SearchedRounding, round_plain, round_searched
from auto_round.tuning.sign_round import SignRound
from auto_round.tuning.statistics import expert_tokens

__all__ = [
    "PlainRounding",
    "SearchedRounding",
    "SignRound",
    "Tuner",
    "TuningTask",
    "quantizers_of",
    "round_plain",
    "round_searched",
    "tune",
    "tuner_for",
    "with_input_quantizers",
]


def tune(task: TuningTask, config: TuneConfig) -> BlockResult:
    """Returns the quantized weights of a block, chosen for the quantized activations that they will meet."""
    peaks = calibrated_peaks(task)
    block = with_input_quantizers(task.block, input_quantizers(task.schemes, peaks))
    # Cross-attention that text leaves out has nothing to be tuned on.
    tuner = tuner_for(config if task.block.runs else dataclasses.replace(config, iters=0), task.schemes.values())
    result = with_peaks(tuner(dataclasses.replace(task, block=block), config), peaks)
    tokens = expert_tokens(task.block, task.inputs, task.batches)
    return dataclasses.replace(result, expert_tokens=tokens, note="; ".join(filter(None, [result.note, idle(tokens)])))


def idle(tokens: Mapping[str, Sequence[int]]) -> str:
    """Returns a line on the experts that no calibration token was routed to; "" if there are none."""
    names = [f"{name}.{index}" for name, counts in tokens.items() for index, count in enumerate(counts) if not count]
    if not names:
        return ""
    return (
        f"calibration never reached {', '.join(names)}: rounded to nearest, scales searched. More samples, or "
        "--calibrate_all_experts, would calibrate them"
    )


def tuner_for(config: TuneConfig, schemes: Iterable[QuantizationScheme] = ()) -> Tuner:
    """Returns the tuner that a configuration asks for, for weights of these schemes."""
    if config.iters > 0:
        return SignRound(mixes_inputs=config.mixes_inputs(min((scheme.bits for scheme in schemes), default=16)))
    return PlainRounding() if config.disable_opt_rtn else SearchedRounding()
