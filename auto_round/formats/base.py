"""An export format: which layout each weight takes, the container, and the config that engines read.

A format declares what it can hold; what it cannot is refused before any work, with every reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from auto_round.config import RunConfig
from auto_round.errors import UnsupportedError
from auto_round.layouts import Layout
from auto_round.plan import Plan, PlanEntry
from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme


class Exporter(Protocol):
    """One export format, registered in EXPORTERS under the name that users ask for."""

    @property
    def name(self) -> str:
        """What users ask for."""
        ...

    @property
    def summary(self) -> str:
        """One line for the table of formats."""
        ...

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:
        """Returns the layout of weights with this scheme, or None when they are written dequantized."""
        ...

    def refusals(self, plan: Plan) -> list[str]:
        """Returns why the format cannot hold the plan, each reason with layer counts; empty when it can."""
        ...

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any] | None:
        """Returns the `quantization_config` of config.json, or None for plain checkpoints."""
        ...


EXPORTERS: Registry[Exporter] = Registry("format")


@dataclasses.dataclass(frozen=True, slots=True)
class FormatTarget:
    """A format and the folder it goes to."""

    exporter: Exporter
    folder: Path


def targets(names: tuple[str, ...], output_dir: Path) -> list[FormatTarget]:
    """Returns where each format goes: one format into `output_dir` itself, several into folders below it.

    Raises:
        ConfigError: an unknown format.
        UnsupportedError: a format that is gone; the message names the alternative.
    """
    gone = [name for name in names if name.split(":")[0] in GONE]
    if gone:
        raise UnsupportedError("; ".join(f"format {name} is not written: {GONE[name.split(':')[0]]}" for name in gone))
    exporters = [EXPORTERS[name] for name in names]
    if len(exporters) == 1:
        return [FormatTarget(exporters[0], output_dir)]
    folders = [output_dir / folder_name(name) for name in names]
    return [FormatTarget(exporter, folder) for exporter, folder in zip(exporters, folders, strict=True)]


def folder_name(format_name: str) -> str:
    """Returns the folder of one of several formats: ":" and "_" become "-"."""
    return format_name.replace(":", "-").replace("_", "-")


def check(plan: Plan, exporters: list[Exporter]) -> None:
    """Raises UnsupportedError with every reason of every format that cannot hold the plan."""
    reasons = [f"{exporter.name}: {reason}" for exporter in exporters for reason in exporter.refusals(plan)]
    if reasons:
        raise UnsupportedError("\n".join(reasons))


def layout_refusals(exporter: Exporter, plan: Plan) -> list[str]:
    """Returns the refusals of the layouts that a format would use, equal reasons joined with a layer count."""
    grouped: dict[str, list[PlanEntry]] = {}
    for entry in plan.quantized().values():
        layout = exporter.layout_for(entry.scheme, plan)
        reason = layout.refuses(entry.scheme, entry.layer.shape) if layout is not None else None
        if reason is None and entry.scheme.quantizes_activations:
            reason = f"act_bits={entry.scheme.act_bits} (only 16)"
        if reason:
            grouped.setdefault(reason, []).append(entry)
    advice = "Use --format auto_round, or give these layers another scheme with layer_config"
    return [
        f"cannot store {reason} for {len(entries)} layers, e.g. {entries[0].layer.name}. {advice}"
        for reason, entries in grouped.items()
    ]


def differing_fields(scheme: QuantizationScheme, base: QuantizationScheme) -> dict[str, Any]:
    """Returns the fields that engines read and in which a layer's scheme differs from the base."""
    if not scheme.is_quantized:
        return {"bits": 16}
    names = ("bits", "group_size", "sym", "data_type")
    found = {name: getattr(scheme, name) for name in names if getattr(scheme, name) != getattr(base, name)}
    return found if scheme.activation == base.activation else found | _activation_difference(scheme, base)


def activation_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """Returns the act_* keys of a scheme, as the configs of auto-round spell them; nothing for 16 bits."""
    activation = scheme.activation
    if activation is None:
        return {}
    fields = {"bits": activation.bits, "group_size": activation.group_size, "sym": activation.sym}
    fields |= {"data_type": activation.data_type, "dynamic": activation.dynamic}
    return {f"act_{name}": value for name, value in fields.items()}


def _activation_difference(scheme: QuantizationScheme, base: QuantizationScheme) -> dict[str, Any]:
    """Returns the act_* keys of a layer that is described by itself; 16 bits are said where the base has others."""
    return activation_fields(scheme) or ({"act_bits": 16} if base.quantizes_activations else {})


def head_entry(plan: Plan) -> Mapping[str, dict[str, Any]]:
    """Returns the full description of a quantized output layer, which engines otherwise take for 16 bits."""
    found = {}
    for entry in plan.outside().values():
        scheme = entry.scheme
        found[entry.layer.name] = {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.sym,
            "data_type": scheme.data_type,
            **_activation_difference(scheme, plan.base),
        }
    return found


# Formats of earlier releases whose engines are no longer maintained.
GONE = {
    "itrex": "its engine is unmaintained. Use auto_round, which runs on CPUs through Transformers",
    "itrex_xpu": "its engine is unmaintained. Use auto_round, which runs on CPUs through Transformers",
}
