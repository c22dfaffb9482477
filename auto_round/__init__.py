"""AutoRound: low-bit quantization of language models by signed-gradient tuning of rounding and clip ranges.

Everything heavy is imported on first use, so `import auto_round` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "1.0.0"

_EXPORTS = {
    "AutoRound": "auto_round.api",
    "AutoRoundMLLM": "auto_round.api",
    "AutoRoundAdam": "auto_round.api",
    "AutoRoundConfig": "transformers",
    "AutoScheme": "auto_round.auto_scheme",
    "QuantizationScheme": "auto_round.schemes",
    "tune_block": "auto_round.api",
}

__all__ = [
    "AutoRound",
    "AutoRoundAdam",
    "AutoRoundConfig",
    "AutoRoundMLLM",
    "AutoScheme",
    "QuantizationScheme",
    "tune_block",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'auto_round' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
