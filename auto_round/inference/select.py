"""Chooses the backend of each layer, by capability and priority or by name."""

from __future__ import annotations

from collections.abc import Sequence

from auto_round.errors import UnsupportedError
from auto_round.inference.backends import BACKENDS, Backend, all_backends, why_not
from auto_round.inference.layer import LayerSpec

AUTO = "auto"


def select_backends(specs: Sequence[LayerSpec], name: str = AUTO) -> dict[str, Backend]:
    """Returns layer name -> backend.

    Args:
        specs: the quantized layers of a model.
        name: "auto", or the name or alias of one backend that shall run them all.
    Raises:
        ConfigError: there is no backend of that name.
        UnsupportedError: layers that the named backend, or any backend, refuses; with each reason, how many layers it
            concerns and one of them.
    """
    candidates = all_backends() if name == AUTO else [BACKENDS[name]]
    chosen: dict[str, Backend] = {}
    refused: dict[str, list[str]] = {}
    for spec in specs:
        reasons = []
        for backend in candidates:
            reason = why_not(backend, spec)
            if reason is None:
                chosen[spec.name] = backend
                break
            reasons.append(reason if name != AUTO else f"{backend.name}: {reason}")
        else:
            refused.setdefault(" | ".join(reasons), []).append(spec.name)
    if refused:
        others = [b.name for b in all_backends() if all(why_not(b, spec) is None for spec in specs)]
        raise UnsupportedError(_refusal(name, refused, others))
    return chosen


def _refusal(name: str, refused: dict[str, list[str]], others: list[str]) -> str:
    total = sum(map(len, refused.values()))
    details = "; ".join(f"{reason} ({len(layers)} layers, e.g. {layers[0]})" for reason, layers in refused.items())
    if name == AUTO:
        return f"no backend can run {total} of the layers: {details}"
    advice = f" These can run all layers: {', '.join(others)}." if others else ""
    return f"backend '{name}' cannot run {total} of the layers: {details}. Use backend='auto'.{advice}"
