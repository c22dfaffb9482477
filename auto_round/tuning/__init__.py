"""Tuners: functions from a block and its inputs to quantized weights."""

from auto_round.config import TuneConfig
from auto_round.tuning.base import Tuner, TuningTask
from auto_round.tuning.rtn import PlainRounding, SearchedRounding, round_plain, round_searched
from auto_round.tuning.sign_round import SignRound

__all__ = [
    "PlainRounding",
    "SearchedRounding",
    "SignRound",
    "Tuner",
    "TuningTask",
    "round_plain",
    "round_searched",
    "tuner_for",
]


def tuner_for(config: TuneConfig) -> Tuner:
    """Returns the tuner that a configuration asks for."""
    if config.iters > 0:
        return SignRound()
    return PlainRounding() if config.disable_opt_rtn else SearchedRounding()
