"""An export format: which layout each weight takes, the container, and the config that engines read.

A format declares what it can hold; what it cannot is refused before any work, with every reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from auto_round.checkpoint import WeightSource
from auto_round.config import RunConfig
from auto_round.errors import UnsupportedError
from auto_round.formats.capability import Capability, counted
from auto_round.layouts import Layout
from auto_round.models.base import ModelStructure
from auto_round.plan import Plan, PlanEntry, Prescription
from auto_round.registry import Registry
from auto_round.schemes import QuantizationScheme
from auto_round.store import RunStore


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What a format writes besides packed weights, and how.

    Attributes:
        config_keys: keys of config.json that hold the quantization config.
        config_files: files beside config.json that repeat it.
        bias_dtype: of the biases of quantized layers; None: as in the original.
    """

    config_keys: tuple[str, ...] = ("quantization_config",)
    config_files: tuple[str, ...] = ("quantization_config.json",)
    bias_dtype: str | None = None


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

    @property
    def capability(self) -> Capability:
        """What it can hold."""
        ...

    @property
    def container(self) -> Container:
        """What it writes besides packed weights."""
        ...

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:
        """Returns the layout of weights with this scheme, or None when they are written dequantized."""
        ...

    def refusals(self, plan: Plan) -> list[str]:
        """Returns why the format cannot hold the plan, by its capability and what is not data; empty when it can."""
        ...

    def warnings(self, plan: Plan) -> list[str]:
        """Returns which of its engines will not take what it can hold; empty when all do."""
        ...

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any] | None:
        """Returns the `quantization_config` of config.json, or None for plain checkpoints."""
        ...


@runtime_checkable
class FileExporter(Exporter, Protocol):
    """A format that is a file of its own kind instead of a checkpoint folder, and prescribes every weight's scheme."""

    def prescription(
        self, structure: ModelStructure, source: WeightSource, tokenizer: Any, config: RunConfig
    ) -> Prescription:
        """Returns what becomes of each weight; whatever keeps the file from being written is an error here."""
        ...

    def write(
        self, folder: Path, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig, tokenizer: Any
    ) -> None:
        """Writes the file into a folder that is there."""
        ...

    def check_written(
        self, folder: Path, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig
    ) -> tuple[list[str], str]:
        """Reopens the file; returns what is wrong with it, and a line on what was looked at."""
        ...


EXPORTERS: Registry[Exporter] = Registry("format")
# Formats that a file format may be written with in one run: they hold whatever it prescribes.
BESIDE_FILES = ("fake",)


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
    gone = {name: GONE.get(name, GONE.get(name.split(":")[0])) for name in names}
    if any(gone.values()):
        raise UnsupportedError("; ".join(f"format {name} is not written: {why}" for name, why in gone.items() if why))
    exporters = [EXPORTERS[name] for name in names]
    if len(exporters) == 1:
        return [FormatTarget(exporters[0], output_dir)]
    folders = [output_dir / folder_name(name) for name in names]
    return [FormatTarget(exporter, folder) for exporter, folder in zip(exporters, folders, strict=True)]


def prescription(
    names: tuple[str, ...], structure: ModelStructure, source: WeightSource, tokenizer: Any, config: RunConfig
) -> Prescription | None:
    """Returns what the one file format among those asked for prescribes; None if there is none.

    Raises:
        ConfigError: options that contradict it, or an unknown format.
        UnsupportedError: formats beside it that cannot hold what it prescribes, or a model that it cannot hold.
    """
    files = {name: EXPORTERS[name] for name in names if name in EXPORTERS and isinstance(EXPORTERS[name], FileExporter)}
    if not files:
        return None
    first, exporter = next(iter(files.items()))
    others = [name for name in names if name != first and EXPORTERS[name].name not in BESIDE_FILES]
    if others:
        raise UnsupportedError(
            f"{first} decides by itself what each weight becomes, so it cannot be written in one run with "
            f"{', '.join(others)}. Give each its own run (only fake may stand beside it)"
        )
    assert isinstance(exporter, FileExporter)
    return exporter.prescription(structure, source, tokenizer, config)


def folder_name(format_name: str) -> str:
    """Returns the folder of one of several formats: ":" and "_" become "-"."""
    return format_name.replace(":", "-").replace("_", "-")


def refusals(exporter: Exporter, plan: Plan) -> list[str]:
    """Returns why a format cannot hold a plan: by what it declares, else by what its layouts say of single weights."""
    texts = exporter.capability.refusals(plan)
    if texts:
        return texts
    grouped: dict[str, list[PlanEntry]] = {}
    layouts: dict[QuantizationScheme, Layout | None] = {}
    for entry in plan.quantized().values():
        if entry.scheme not in layouts:
            layouts[entry.scheme] = exporter.layout_for(entry.scheme, plan)
        layout = layouts[entry.scheme]
        reason = layout.refuses(entry.scheme, entry.layer.shape) if layout is not None else None
        if reason:
            grouped.setdefault(reason, []).append(entry)
    return [
        f"cannot store {reason} for {counted(entries)}. Give these layers another scheme with --layer_config"
        for reason, entries in grouped.items()
    ]


def copied_dtype(
    exporter: Exporter, quantized: Collection[str], parameter: str | None, asked: str | None
) -> str | None:
    """Returns the dtype in which a floating-point tensor is written that is not packed; None: as it is.

    Args:
        quantized: names of the weights that are quantized.
        parameter: its name within the model, if it is one of its parameters.
        asked: dtype of --model_dtype.
    """
    own = exporter.container.bias_dtype
    if own is not None and parameter is not None and parameter.endswith(".bias"):
        if parameter.removesuffix("bias") + "weight" in quantized:
            return own
    return asked


def check(plan: Plan, exporters: list[Exporter]) -> None:
    """Raises UnsupportedError with every reason of every format that cannot hold the plan, and the formats that can."""
    lines = []
    for exporter in exporters:
        reasons = exporter.refusals(plan)
        lines += [f"{exporter.name}: {reason}" for reason in reasons]
        if reasons:
            lines.append(f"{exporter.name}: this holds everything that was asked: {', '.join(holders(plan))}")
    if lines:
        raise UnsupportedError("\n".join(lines))


def holders(plan: Plan) -> list[str]:
    """Returns `--format` and name of each format that can hold a plan, the default first and fake last."""
    able = [name for name, exporter in EXPORTERS.items() if name == exporter.name and not exporter.refusals(plan)]
    return [f"--format {name}" for name in sorted(able, key=lambda name: (name == "fake", name != "auto_round"))]


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


# Formats of other releases, by their name or what stands before the colon -> why, and what to use.
GONE = {
    "itrex": "its engine is unmaintained. Use auto_round, which runs on CPUs through Transformers",
    "itrex_xpu": "its engine is unmaintained. Use auto_round, which runs on CPUs through Transformers",
    "auto_round:mlx": "no engine but MLX reads its tensors. Use mlx, which mlx-lm loads",
    "svdquant_nunchaku": "it is for diffusion models, which are not quantized. Use auto_round for language models",
}
