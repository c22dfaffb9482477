"""Matrices of a checkpoint that the model's class does not know, such as layers for multi-token prediction.

They are carried over as they are; engines that do know them are told that they stay in 16 bits.
"""

from __future__ import annotations

from auto_round.checkpoint import WeightSource


def extra_matrices(source: WeightSource) -> list[str]:
    """Returns the keys of stored matrices that no part of the model takes: layers for multi-token prediction."""
    return sorted(key for key in source.ignored() if source.outline(key).ndim > 1)


def extra_modules(source: WeightSource) -> tuple[str, ...]:
    """Returns the modules that extra matrices are in: of each the outermost that holds nothing of the model."""
    extra = extra_matrices(source)
    own = {place for key in source.keys().keys() - source.ignored() for place in _places(key)}
    return tuple(dict.fromkeys(next((p for p in _places(key) if p not in own), key) for key in extra))


def _places(key: str) -> list[str]:
    """Returns the modules that a tensor is in, the outermost first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
