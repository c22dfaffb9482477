"""Decides what becomes of each weight, before any weight is read.

`resolve` turns a model's structure and the scheme options into a `Plan`: one entry per weight with its scheme and the
reason. It is the only place that changes what was asked for, and each change is an `Adjustment` in the plan. Patterns
in `layer_config` and `fp_layers` are those of `layer_patterns`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from auto_round.config import SchemeConfig
from auto_round.data_types import DATA_TYPES
from auto_round.data_types.activations import why_not_activation
from auto_round.errors import ConfigError, nearest
from auto_round.layer_patterns import PLACES, matching
from auto_round.models.base import LinearInfo, ModelStructure
from auto_round.schemes import QuantizationScheme, check_fields, preset_name_to_scheme
from auto_round.tensors import group_count

SIXTEEN_BIT = QuantizationScheme(bits=16)
SMALLEST_GROUP = 16
KERNEL_MULTIPLE = 32  # inputs and outputs that GPTQ and AWQ kernels take a multiple of
# Layers whose weights serving engines join into one matrix, so that their schemes must agree. Source: vLLM's and
# SGLang's packed_modules_mapping for the Llama and Qwen families; w1 and w3 are what Mixtral calls an expert's gate and
# up projections.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclasses.dataclass(frozen=True, slots=True)
class Adjustment:
    """One thing that was changed from what was asked, and why."""

    layer: str
    field: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.field} {self.old} -> {self.new} ({self.why})"


@dataclasses.dataclass(frozen=True, slots=True)
class PlanEntry:
    """What becomes of one weight.

    Attributes:
        layer: the linear layer; for other weights a stand-in with its parameter's module name.
        scheme: what it becomes; 16 bits means it stays.
        reason: why, in a few words.
    """

    layer: LinearInfo
    scheme: QuantizationScheme
    reason: str

    @property
    def stored_bits(self) -> float:
        """Bits a weight takes, scales and zero points counted."""
        if not self.scheme.is_quantized:
            return 16.0
        rows, width = self.layer.shape
        size = self.scheme.group_size
        scales_down = 1 if size == 0 else -(-rows // size[0]) if isinstance(size, tuple) else rows
        scales = scales_down * group_count(width, size)
        return self.scheme.bits + scales * DATA_TYPES[self.scheme.data_type].scale_bits(self.scheme) / (rows * width)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The resolved plan of a run.

    Attributes:
        entries: one per linear layer, in model order.
        groups: block names, those tuned together in one tuple.
        base: scheme of layers that nothing else was said of.
        structure: the model's blocks and layers.
        adjustments: what was changed from what was asked.
        has_cache_scales: scales of an FP8 key/value cache are measured for each block.
        warnings: what works here but may not be taken by serving engines.
        prescribed_by: the format that says what becomes of each weight, or None where the scheme options do.
    """

    entries: tuple[PlanEntry, ...]
    groups: tuple[tuple[str, ...], ...]
    base: QuantizationScheme
    structure: ModelStructure
    adjustments: tuple[Adjustment, ...]
    warnings: tuple[str, ...]
    has_cache_scales: bool = False
    prescribed_by: str | None = None

    def quantized(self) -> dict[str, PlanEntry]:
        """Returns weight parameter name -> entry for every weight that is quantized."""
        return {entry.layer.parameter: entry for entry in self.entries if entry.scheme.is_quantized}

    def in_group(self, names: Sequence[str]) -> dict[str, PlanEntry]:
        """Returns parameter name -> entry for the quantized weights of some blocks."""
        dots = tuple(name + "." for name in names)
        return {name: entry for name, entry in self.quantized().items() if name.startswith(dots)}

    def outside(self) -> dict[str, PlanEntry]:
        """Returns parameter name -> entry for quantized weights outside the blocks (lm_head)."""
        return {name: entry for name, entry in self.quantized().items() if entry.layer.block is None}

    @property
    def needs_calibration(self) -> bool:
        """Whether anything stored is measured on calibration text: ranges of activations, scales of a cache."""
        found = (entry.scheme.activation for entry in self.quantized().values())
        return self.has_cache_scales or any(one is not None and one.needs_calibration for one in found)

    def average_bits(self) -> float:
        """Returns the mean bits of a linear weight inside the blocks, scales and zero points counted."""
        inside = [entry for entry in self.entries if entry.layer.block is not None]
        weights = [entry.layer.shape[0] * entry.layer.shape[1] for entry in inside]
        total = sum(size * entry.stored_bits for size, entry in zip(weights, inside, strict=True))
        return total / max(sum(weights), 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Prescription:
    """What a format wants each weight to become, in place of the scheme options.

    Attributes:
        format: its name.
        base: scheme of most weights.
        schemes: layer name -> scheme and reason, for every linear layer and every layer in `more`.
        more: further layers that are quantized, e.g. the embedding.
        override: what a layer_config asks for, layer and scheme fields -> scheme; a ConfigError if there is no such.
    """

    format: str
    base: QuantizationScheme
    schemes: Mapping[str, tuple[QuantizationScheme, str]]
    more: tuple[LinearInfo, ...]
    override: Callable[[LinearInfo, Mapping[str, Any]], QuantizationScheme]


def resolve(
    structure: ModelStructure, config: SchemeConfig, *, nblocks: int = 1, prescription: Prescription | None = None
) -> Plan:
    """Returns the plan for a model.

    Args:
        prescription: what a format says of each weight; layer_config and fp_layers win over it.
    Raises:
        ConfigError: patterns that match no layer, unknown scheme fields, or nothing left to quantize. All together.
    """
    if prescription is not None:
        return _prescribed(structure, config, nblocks, prescription)
    base = config.base_scheme()
    overrides, problems = _resolve_patterns(structure.linears, config)
    entries, adjustments = [], []
    for layer in structure.linears:
        scheme, reason = _scheme_of(layer, structure, base, overrides, config)
        problems += [problem for problem in why_not_scheme(scheme) if problem not in problems]
        scheme, changes = fit_group(layer, scheme)
        adjustments += changes
        entries.append(PlanEntry(layer, scheme, reason + "".join(f"; {change.why}" for change in changes)))
    if config.quant_lm_head and structure.head is None:
        problems.append("quant_lm_head was asked for, but the model has no output layer")
    if config.quant_nontext_module and not any(
        e.layer.block is None and e.layer.name != structure.head for e in entries
    ):
        problems.append("quant_nontext_module was asked for, but the model has no vision tower or projector")
    if not problems and not any(entry.scheme.is_quantized for entry in entries):
        problems.append("nothing is left to quantize: every layer is kept in 16 bits")
    if problems:
        raise ConfigError("\n".join(problems))
    return Plan(
        tuple(entries), _groups(structure, nblocks), base, structure, tuple(adjustments),
        tuple(_fused_warnings(entries)), has_cache_scales=config.static_kv_dtype is not None,
    )  # fmt: skip


def _groups(structure: ModelStructure, nblocks: int) -> tuple[tuple[str, ...], ...]:
    return tuple(structure.blocks[start : start + nblocks] for start in range(0, len(structure.blocks), nblocks))


def _prescribed(structure: ModelStructure, config: SchemeConfig, nblocks: int, prescription: Prescription) -> Plan:
    layers = (*structure.linears, *prescription.more)
    overrides, problems = _resolve_patterns(layers, config)
    entries = []
    for layer in layers:
        scheme, reason = prescription.schemes[layer.name]
        if layer.name in overrides:
            fields, pattern = overrides[layer.name]
            reason = f"by '{pattern}'"
            try:
                scheme = prescription.override(layer, fields)
            except ConfigError as error:
                problems += [] if str(error) in problems else [str(error)]
        entries.append(PlanEntry(layer, scheme, reason))
    if problems:
        raise ConfigError("\n".join(problems))
    return Plan(
        tuple(entries), _groups(structure, nblocks), prescription.base, structure, (), (),
        has_cache_scales=config.static_kv_dtype is not None, prescribed_by=prescription.format,
    )  # fmt: skip


def _resolve_patterns(
    layers: Sequence[LinearInfo], config: SchemeConfig
) -> tuple[dict[str, tuple[dict[str, Any], str]], list[str]]:
    """Returns layer name -> (scheme fields, the pattern that said so), and the problems found.

    Later patterns win over earlier ones, exact names over patterns, fp_layers over layer_config.
    """
    names = [layer.name for layer in layers]
    rules: list[tuple[str, Any]] = sorted(config.layer_config.items(), key=lambda rule: rule[0] in names)
    rules += [(pattern.strip(), {"bits": 16}) for pattern in config.fp_layers.split(",") if pattern.strip()]
    found: dict[str, tuple[dict[str, Any], str]] = {}
    problems = []
    for pattern, value in rules:
        try:
            fields = _scheme_fields(value)
            hits = matching(pattern, layers)
        except ConfigError as error:
            problems.append(f"'{pattern}': {error}")
            continue
        if not hits:
            leaves = {name.rpartition(".")[2] for name in names}
            hint = nearest(pattern, [*names, *leaves, *PLACES])
            problems.append(
                f"pattern '{pattern}' matches no linear layer.{hint} Layers end in: {', '.join(sorted(leaves))}"
            )
        for name in hits:
            found[name] = (fields, pattern)
    return found, problems


def named_layers(plan: Plan, config: SchemeConfig) -> set[str]:
    """Returns the layers of a plan that layer_config or fp_layers speak of."""
    return set(_resolve_patterns([entry.layer for entry in plan.entries], config)[0])


def _scheme_fields(value: Any) -> dict[str, Any]:
    """Returns scheme fields from a mapping of fields, a preset name, a number of bits or a scheme."""
    if isinstance(value, bool):
        raise ConfigError(f"{value} is no scheme: give scheme fields, a preset name or a number of bits")
    if isinstance(value, int):
        value = {"bits": value}
    if isinstance(value, str):
        return preset_name_to_scheme(value).to_dict()
    if isinstance(value, QuantizationScheme):
        return value.to_dict()
    if isinstance(value, Mapping):
        fields = {name: field for name, field in value.items() if field is not None}
        check_fields(fields)
        QuantizationScheme.from_dict(fields)
        return fields
    raise ConfigError(f"{value!r} is no scheme: give scheme fields, a preset name or a number of bits")


def _scheme_of(
    layer: LinearInfo,
    structure: ModelStructure,
    base: QuantizationScheme,
    overrides: Mapping[str, tuple[dict[str, Any], str]],
    config: SchemeConfig,
) -> tuple[QuantizationScheme, str]:
    if layer.kept:
        return SIXTEEN_BIT, layer.kept
    if layer.name in overrides:
        fields, pattern = overrides[layer.name]
        return base.replace(**fields), f"by '{pattern}'"
    if layer.block is not None:
        return base, "in a block"
    if layer.name == structure.head and config.quant_lm_head:
        return base, "quant_lm_head, untied from the embedding" if structure.tied_head else "quant_lm_head"
    if layer.name != structure.head and config.quant_nontext_module:
        reason = _why_not_beside_text(layer, base)
        return (SIXTEEN_BIT, reason) if reason else (base, "quant_nontext_module")
    reason = "output layer (--quant_lm_head quantizes it)" if layer.name == structure.head else "outside the blocks"
    return SIXTEEN_BIT, reason


def _why_not_beside_text(layer: LinearInfo, base: QuantizationScheme) -> str:
    """Returns why a layer of a vision tower or projector stays in 16 bits, "" if it need not."""
    if any(size % KERNEL_MULTIPLE for size in layer.shape):
        return f"{' x '.join(map(str, layer.shape))}: kernels take multiples of {KERNEL_MULTIPLE}"
    if base.activation is not None and base.activation.needs_calibration:
        return "ranges of activations are calibrated within blocks only"
    return ""


def why_not_scheme(scheme: QuantizationScheme) -> list[str]:
    """Returns what a scheme asks for that its data types cannot be."""
    if not scheme.is_quantized:
        return []
    reasons = [DATA_TYPES[scheme.data_type].refuses(scheme)]
    reasons += [why_not_activation(scheme.activation)] if scheme.activation is not None else []
    return [f"scheme {scheme}: {reason}" for reason in reasons if reason]


def fit_group(layer: LinearInfo, scheme: QuantizationScheme) -> tuple[QuantizationScheme, list[Adjustment]]:
    """Returns a scheme whose groups fit the layer: a smaller group that divides the row, else a shorter last group."""
    width, size = layer.shape[1], scheme.group_size
    if not scheme.is_quantized or scheme.data_type != "int" or not isinstance(size, int) or size < 1:
        return scheme, []
    if width % size == 0:
        return scheme, []
    smaller = size
    while smaller > SMALLEST_GROUP and width % smaller:
        smaller //= 2
    if width % smaller == 0:
        why = f"{size} does not divide {width} inputs"
        return scheme.replace(group_size=smaller), [Adjustment(layer.name, "group_size", size, smaller, why)]
    if size >= width:
        return scheme.replace(group_size=-1), [Adjustment(layer.name, "group_size", size, -1, f"only {width} inputs")]
    why = f"{size} does not divide {width} inputs; loads in Transformers, not in serving engines"
    return scheme, [Adjustment(layer.name, "last group", size, width % size, why)]


def _fused_warnings(entries: Sequence[PlanEntry]) -> list[str]:
    warnings = []
    by_name = {entry.layer.name: entry for entry in entries}
    for members in FUSED_GROUPS:
        for name, entry in by_name.items():
            stem, _, leaf = name.rpartition(".")
            others = [by_name[f"{stem}.{member}"] for member in members[1:] if f"{stem}.{member}" in by_name]
            if leaf == members[0] and any(other.scheme != entry.scheme for other in others):
                joined = "/".join(members)
                warnings.append(f"{stem}: {joined} have different schemes; vLLM and SGLang join them and will refuse")
    return warnings


def table(rows: list[tuple[str, ...]]) -> str:
    """Returns rows as aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def describe(plan: Plan) -> str:
    """Returns the plan as a table: layers of the same kind and scheme on one line, then sums."""
    kinds: dict[tuple[str, str, str], list[PlanEntry]] = {}
    for entry in plan.entries:
        kind = re.sub(r"\.\d+\.", ".*.", entry.layer.name)
        kinds.setdefault((kind, str(entry.scheme), entry.reason), []).append(entry)
    rows: list[tuple[str, ...]] = [("layers", "count", "shape", "becomes", "bits", "MB", "why")]
    for (kind, scheme, reason), entries in kinds.items():
        shape = " x ".join(map(str, entries[0].layer.shape))
        size = sum(e.layer.shape[0] * e.layer.shape[1] * e.stored_bits / 8e6 for e in entries)
        rows.append((kind, str(len(entries)), shape, scheme, f"{entries[0].stored_bits:.2f}", f"{size:.1f}", reason))
    lines = [table(rows)]
    planned = {entry.layer.parameter for entry in plan.entries}
    for name, reason in plan.structure.other_weights.items():
        if name in planned:
            continue
        lines.append(f"{name}  stays: {reason}")
    lines.append(f"average bits of block weights, scales counted: {plan.average_bits():.2f}")
    lines += [f"changed: {adjustment}" for adjustment in plan.adjustments]
    lines += [f"note: {warning}" for warning in plan.warnings]
    return "\n".join(lines)
