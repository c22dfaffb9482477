"""What a format can hold, as data. Refusals, their advice and the table of formats are all derived from it.

A `SchemeSet` gives the values that each field of a scheme may take; a format holds the schemes of any of its sets. A
`Capability` adds what concerns shapes, mixtures and the layers outside the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from auto_round.plan import Plan, PlanEntry
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import effective_group_size

ALL_BITS = frozenset(range(2, 9))
BOTH = frozenset({True, False})
# Scheme field -> value -> how it is asked for on the command line, where that is not `--field value`.
FLAGS = {
    "sym": {True: "Leave out --asym", False: "Use --asym"},
    "act_dynamic": {True: "Leave out --disable_act_dynamic", False: "Use --disable_act_dynamic"},
}


NO_CACHE_SCALES = "cannot store scales of an FP8 key/value cache. Leave out --static_kv_dtype"


@dataclasses.dataclass(frozen=True, slots=True)
class Mismatch:
    """One reason why a layer cannot be held.

    Attributes:
        reason: what was asked and what is allowed, e.g. "bits=3 (only 4)".
        changes: scheme field and value that would be held, nearest to what was asked; None if no scheme helps.
        remedy: what to do when no other scheme helps.
    """

    reason: str
    changes: tuple[str, Any] | None = None
    remedy: str = "Keep them in 16 bits with --fp_layers"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchemeSet:
    """The schemes whose every field has one of the values given here; None stands for all values.

    Attributes:
        data_types, bits, sym: of the weight.
        group_sizes: positive group sizes, and pairs of rows and columns.
        per_row, per_tensor: whether group_size -1 and 0 are held.
        act_bits: widths of activations; 16 alone means that they are not quantized.
        act_data_types, act_group_sizes, act_dynamic: of activations, where they are quantized.
    """

    data_types: frozenset[str] | None = frozenset({"int"})
    bits: frozenset[int] | None = ALL_BITS
    sym: frozenset[bool] | None = BOTH
    group_sizes: frozenset[int | tuple[int, int]] | None = None
    per_row: bool = True
    per_tensor: bool = False
    act_bits: frozenset[int] | None = frozenset({16})
    act_data_types: frozenset[str] | None = None
    act_group_sizes: frozenset[int] | None = None
    act_dynamic: frozenset[bool] | None = None

    def mismatches(self, scheme: QuantizationScheme, width: int) -> list[Mismatch]:
        """Returns the fields that keep a scheme of a layer with `width` inputs out of this set; empty when it is in."""
        wanted: list[tuple[str, Any, frozenset[Any] | None]] = [
            ("data_type", scheme.data_type, self.data_types),
            ("bits", scheme.bits, self.bits),
            ("sym", scheme.sym, self.sym),
            ("act_bits", scheme.act_bits, self.act_bits),
        ]
        activation = scheme.activation
        if activation is not None and self.act_bits != {16}:
            wanted.append(("act_data_type", activation.data_type, self.act_data_types))
            wanted.append(("act_group_size", activation.group_size, self.act_group_sizes))
            wanted.append(("act_dynamic", activation.dynamic, self.act_dynamic))
        found = [
            Mismatch(f"{name}={value} (only {_listed(allowed)})", (name, _nearest(value, allowed)))
            for name, value, allowed in wanted
            if allowed is not None and value not in allowed
        ]
        return found if self._holds_group(scheme.group_size) else [*found, self._group_mismatch(scheme, width)]

    def describe(self) -> dict[str, str]:
        """Returns the set in words, column of the table of formats -> cell."""
        groups = ["any"] if self.group_sizes is None else [_listed(self.group_sizes)] if self.group_sizes else []
        groups += ["row"] * (self.per_row and self.group_sizes is not None) + ["tensor"] * self.per_tensor
        return {
            "data type": _listed_or_any(self.data_types),
            "bits": _listed_or_any(self.bits),
            "group size": ", ".join(groups),
            "symmetry": "both" if self.sym in (None, BOTH) else "sym" if self.sym == {True} else "asym",
            "act bits": _listed_or_any(self.act_bits),
        }

    def _holds_group(self, size: int | tuple[int, int]) -> bool:
        if isinstance(size, int) and size <= 0:
            return self.per_row if size == -1 else self.per_tensor
        return self.group_sizes is None or size in self.group_sizes

    def _group_mismatch(self, scheme: QuantizationScheme, width: int) -> Mismatch:
        """Returns the reason and the nearest group size. A plan halves groups until they fit, so it need not divide."""
        size, known = scheme.group_size, self.group_sizes
        words = ["groups of any size"] if known is None else [_listed(known)] if known else []
        words += ["-1: one scale per row"] * self.per_row + ["0: one scale per tensor"] * self.per_tensor
        meaning = ", one scale per tensor" if size == 0 else ", one scale per row" if size == -1 else ""
        reason = f"group_size={size}{meaning} (only {', '.join(words)})"
        sizes = [128] if known is None else [value for value in known if isinstance(value, int)]
        if known is None or any(width % value == 0 for value in sizes):
            return Mismatch(
                reason, ("group_size", _nearest(size if isinstance(size, int) and size > 0 else 128, sizes))
            )
        return Mismatch(reason, ("group_size", -1) if self.per_row else None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What a format can hold.

    Attributes:
        schemes: a layer is held if its scheme is in one of these.
        loads_in: the engines that load the result, for people.
        loads_here: whether Transformers with this package does, so that the result can be evaluated.
        uniform: scheme fields in which all quantized layers must agree.
        head: whether the output layer may be quantized.
        outside: whether other layers outside the blocks may be.
        partial_groups: whether the last group of a row may be shorter.
        transposed: whether layers whose weight is stored (in, out) are held, as GPT-2's.
        cache_scales: whether calibrated scales of an FP8 key/value cache have a place.
        fused_experts: whether quantized experts load that Transformers knows fused only.
        in_multiple, out_multiple: what in and out features must be multiples of.
    """

    schemes: tuple[SchemeSet, ...]
    loads_in: str
    loads_here: bool = True
    uniform: tuple[str, ...] = ()
    head: bool = True
    outside: bool = False
    partial_groups: bool = False
    transposed: bool = True
    cache_scales: bool = False
    fused_experts: bool = True
    in_multiple: int = 1
    out_multiple: int = 1

    def mismatches(self, entry: PlanEntry, head: str | None) -> list[Mismatch]:
        """Returns why a quantized layer cannot be held, by the scheme set that comes nearest; empty when it can.

        Args:
            head: name of the model's output layer.
        """
        width = entry.layer.shape[1]
        found = min((schemes.mismatches(entry.scheme, width) for schemes in self.schemes), key=_distance)
        size = effective_group_size(entry.scheme.group_size, width)
        if not found and not self.partial_groups and width % size:
            found = [Mismatch(f"groups of {size} that do not divide {width} inputs")]
        return [*found, *self._shape_mismatches(entry, head)]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns why a plan cannot be held: one text per reason, with layer counts and what would be held."""
        grouped: dict[str, tuple[Mismatch, list[PlanEntry]]] = {}
        held = []
        for entry in plan.quantized().values():
            found = self.mismatches(entry, plan.structure.head)
            for mismatch in found:
                grouped.setdefault(mismatch.reason, (mismatch, []))[1].append(entry)
            held += [] if found else [entry]
        texts = [
            f"cannot store {reason} for {counted(entries)}. {_advice(mismatch, entries, plan)}"
            for reason, (mismatch, entries) in grouped.items()
        ]
        if plan.has_cache_scales and not self.cache_scales:
            texts.append(NO_CACHE_SCALES)
        experts = () if self.fused_experts else quantized_experts(plan, plan.structure.fused_experts)
        if experts:
            texts.append(
                f"cannot store experts in a form that loads, for {counted(experts)}: checkpoints of this model hold "
                "all experts in one tensor, and Transformers would leave these out without an error. Use --format "
                "auto_round"
            )
        return texts + [text for field in self.uniform if (text := _disagreement(field, held))]

    def describe(self) -> dict[str, str]:
        """Returns the capability in words, column of the table of formats -> cell."""
        columns = [schemes.describe() for schemes in self.schemes]
        cells = {name: " / ".join(dict.fromkeys(column[name] for column in columns)) for name in columns[0]}
        mixed = f"one {' and '.join(self.uniform)}" if self.uniform else "yes"
        return cells | {"mixed": mixed, "lm_head": "yes" if self.head else "no", "loads in": self.loads_in}

    def _shape_mismatches(self, entry: PlanEntry, head: str | None) -> Iterator[Mismatch]:
        layer, (rows, width) = entry.layer, entry.layer.shape
        if width % self.in_multiple:
            yield Mismatch(f"{width} inputs (only multiples of {self.in_multiple})")
        if rows % self.out_multiple:
            yield Mismatch(f"{rows} outputs (only multiples of {self.out_multiple})")
        if layer.transposed and not self.transposed:
            yield Mismatch("weights that the model stores transposed")
        if layer.name == head and not self.head:
            yield Mismatch("a quantized output layer", remedy="Leave out --quant_lm_head")
        if layer.block is None and layer.name != head and not self.outside:
            yield Mismatch("quantized layers outside the blocks")


def _distance(found: Sequence[Mismatch]) -> tuple[bool, bool, int, int, int]:
    """Returns how far a scheme is from a set: what no other value cures, then how many fields change, then of weights.

    Another data type, and activations that are not quantized at all, are no near miss.
    """
    changes = [one.changes for one in found if one.changes is not None]
    fields = [field for field, _ in changes]
    weight_fields = sum(not field.startswith("act_") for field in fields)
    uncured = len(found) - len(changes)
    return "data_type" in fields, ("act_bits", 16) in changes, uncured, len(found), weight_fields


def quantized_experts(plan: Plan, modules: Iterable[str]) -> list[PlanEntry]:
    """Returns the quantized layers in some modules."""
    inside = tuple(f"{module}." for module in modules)
    return [entry for entry in plan.quantized().values() if entry.layer.name.startswith(inside)]


def counted(entries: Sequence[PlanEntry]) -> str:
    """Returns how many layers there are, and the name of one."""
    return f"{len(entries)} layer{'' if len(entries) == 1 else 's'}, e.g. {entries[0].layer.name}"


def _advice(mismatch: Mismatch, entries: Sequence[PlanEntry], plan: Plan) -> str:
    """Returns what would be held: an option if it concerns all layers with the base's value, else a layer_config."""
    if mismatch.changes is None:
        return mismatch.remedy
    field, value = mismatch.changes
    asked = getattr(entries[0].scheme, field)
    alike = [entry for entry in plan.quantized().values() if getattr(entry.scheme, field) == asked]
    if getattr(plan.base, field) != asked or len(alike) > len(entries):
        return f"Give these layers {field}={value} with --layer_config"
    return FLAGS[field][value] if field in FLAGS else f"Use --{field} {value}"


def _disagreement(field: str, held: Sequence[PlanEntry]) -> str | None:
    """Returns how layers, each of which could be held, differ in a field in which they must agree, or None."""
    by_value: dict[Any, list[PlanEntry]] = {}
    for entry in held:
        by_value.setdefault(getattr(entry.scheme, field), []).append(entry)
    if len(by_value) < 2:
        return None
    most = max(by_value, key=lambda value: len(by_value[value]))
    parts = [f"{field}={value} ({counted(entries)})" for value, entries in by_value.items()]
    return f"cannot store layers that differ in {field}: {', '.join(parts)}. Give all layers {field}={most}"


def _nearest(value: Any, allowed: Iterable[Any]) -> Any:
    """Returns the allowed value nearest to what was asked: by ratio for numbers, else the first one."""
    known = sorted(allowed, key=_order)
    if isinstance(value, bool) or not isinstance(value, int):
        return known[0]
    return min(known, key=lambda other: (max(other, value) / max(min(other, value), 1), other))


def _listed_or_any(values: frozenset[Any] | None) -> str:
    return "any" if values is None else _listed(values)


def _listed(values: Iterable[Any]) -> str:
    """Returns values in order, runs of more than three whole numbers as "2 to 8"."""
    known = sorted(values, key=_order)
    numbers = all(isinstance(value, int) for value in known)
    if numbers and len(known) > 3 and known[-1] - known[0] == len(known) - 1:
        return f"{known[0]} to {known[-1]}"
    return ", ".join(map(str, known))


def _order(value: Any) -> tuple[bool, float, str]:
    """Returns a sorting key: numbers by size, then everything else by its text."""
    return not isinstance(value, int), value if isinstance(value, int) else 0, str(value)
