"""Chooses the backend of each layer, by capability and priority or by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.inference.backends import Backend, all_backends, backend_named, why_not
from auto_round.inference.layer import LayerSpec, QuantizedLinear

AUTO = "auto"

logger = logging.getLogger(__name__)


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
    candidates = all_backends() if name == AUTO else [backend_named(name)]
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


def kernel_for(spec: LayerSpec, name: str = AUTO) -> Callable[[QuantizedLinear], nn.Module]:
    """Returns the function that makes the kernel of one layer; arguments and errors as for `select_backends`."""
    return select_backends([spec], name)[spec.name].prepare


def hint(specs: Sequence[LayerSpec], chosen: Mapping[str, Backend]) -> str | None:
    """Returns one line about the best backend that is better than what was chosen, but for a package not installed.

    Args:
        specs: the quantized layers of a model.
        chosen: what `select_backends` returned for them.
    """
    for backend in all_backends():
        if not backend.missing():
            continue
        installed = dataclasses.replace(backend, requires=())
        names = [s.name for s in specs if backend.rank() > chosen[s.name].rank() and why_not(installed, s) is None]
        if names:
            now = ", ".join(sorted({chosen[name].name for name in names}))
            gain = backend.brings or "a better backend"
            return (
                f"pip install {backend.packages()} would bring {gain} for {len(names)} of {len(specs)} quantized "
                f"layers ({backend.name} instead of {now})"
            )
    return None


def _refusal(name: str, refused: dict[str, list[str]], others: list[str]) -> str:
    total = sum(map(len, refused.values()))
    details = "; ".join(f"{reason} ({len(layers)} layers, e.g. {layers[0]})" for reason, layers in refused.items())
    if name == AUTO:
        return f"no backend can run {total} of the layers: {details}"
    advice = f" These can run all layers: {', '.join(others)}." if others else ""
    return f"backend '{name}' cannot run {total} of the layers: {details}. Use backend='auto'.{advice}"
