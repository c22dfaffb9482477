"""What there is to choose: groups of layers that get one option together, and what each option costs there.

Layers that serving engines join (q/k/v, gate/up) are one group unless `separate_joined`, and so are the routed experts
of a block. Layers that
`layer_config` or `fp_layers` speak of are fixed; they count in the budget. Options that a format cannot hold for a
group are no options there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import torch

from auto_round.config import MODEL_DTYPES, MixedBitsConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats import Exporter
from auto_round.formats.base import check
from auto_round.layer_patterns import EXPERT, is_expert
from auto_round.option_values import parse_size
from auto_round.plan import FUSED_GROUPS, Plan, PlanEntry, named_layers, table
from auto_round.schemes import QuantizationScheme, to_scheme
from auto_round.session import Session, replanned

logger = logging.getLogger(__name__)

HEADER_BYTES = 160  # of one tensor in the header of a safetensors file: its name, shape, dtype and place


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One scheme to choose.

    Attributes:
        name: as it was given, for people and recipes.
        value: what a layer_config takes: a preset name or scheme fields.
    """

    name: str
    value: str | dict[str, object]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that get the same option.

    Attributes:
        name: for people, e.g. "model.layers.0.self_attn.q_proj/k_proj/v_proj".
        pattern: the layer_config key that means exactly these layers, or "" if each needs its own.
        layers: their names, all in one block.
        block: index of it.
        costs: index of an option -> bits that all layers take with it; options that cannot be held are missing.
        entries: index of an option -> plan entry of each layer.
    """

    name: str
    pattern: str
    layers: tuple[str, ...]
    block: int
    costs: Mapping[int, int]
    entries: Mapping[int, tuple[PlanEntry, ...]]

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(math.prod(entry.layer.shape) for entry in next(iter(self.entries.values())))


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """Everything that an allocation chooses from.

    Attributes:
        budget: bits that all groups together may take.
        fixed: bits that everything else takes that the target counts.
        total: weights that the target is a mean over; 0 for a size.
    """

    options: tuple[Option, ...]
    groups: tuple[LayerGroup, ...]
    budget: int
    fixed: int
    total: int


def find_choices(session: Session, exporters: Sequence[Exporter]) -> Choices:
    """Returns the choices of a session that asks for mixed bits.

    Raises:
        ConfigError: options that are no schemes, or a budget that cannot be kept.
        UnsupportedError: a format that cannot hold the options, or not beside each other.
    """
    config = session.config
    options = _parsed(config.mixed)
    named = named_layers(session.plan, config.scheme)
    free = [e.layer.name for e in session.plan.quantized().values() if _is_free(e) and e.layer.name not in named]
    if not free:
        raise ConfigError("options: there is no layer left to choose for; layer_config and fp_layers name all of them")
    plans = [_plan_with(session, dict.fromkeys(free, option.value)) for option in options]
    members = _grouped(free, () if config.mixed.separate_joined else FUSED_GROUPS)
    mixture = _mixture(session, options, members)
    held = [_held(plan, exporters) for plan in plans]
    by_layer = [{entry.layer.name: entry for entry in plan.entries} for plan in plans]
    groups = []
    for name, layers in members.items():
        entries = {i: tuple(by_layer[i][n] for n in layers) for i in range(len(options)) if held[i].issuperset(layers)}
        if not entries:
            check(plans[0], list(exporters))
            raise UnsupportedError(f"no option can be held for {name} by {', '.join(e.name for e in exporters)}")
        costs = {i: sum(_cost(e, config.mixed, exporters, mixture) for e in own) for i, own in entries.items()}
        block = entries[next(iter(entries))][0].layer.block
        assert block is not None
        groups.append(LayerGroup(name, _pattern(name), tuple(layers), block, costs, entries))
    for index, option in enumerate(options):
        if not any(index in group.costs for group in groups):
            by = " or ".join(exporter.name for exporter in exporters)
            logger.warning("option %s is left out: %s cannot hold it", option.name, by)
    check(_mixture(session, options, members, groups), list(exporters))
    return _with_budget(session, options, tuple(groups), set(free), exporters, mixture)


def _parsed(config: MixedBitsConfig) -> tuple[Option, ...]:
    """Returns the options, each scheme once, in the order in which they were given."""
    found: dict[QuantizationScheme, Option] = {}
    for value in config.option_list():
        scheme = to_scheme(value)
        if scheme not in found:
            found[scheme] = Option(value, value) if isinstance(value, str) else Option(str(scheme), scheme.to_dict())
    if len(found) < 2:
        raise ConfigError(f"options={config.options}: there is nothing to choose between. Give two schemes or more")
    return tuple(found.values())


def _plan_with(session: Session, layers: Mapping[str, object]) -> Plan:
    """Returns the plan where some layers, which nothing else is said of, become something else."""
    scheme = session.config.scheme
    changed = dataclasses.replace(scheme, layer_config={**layers, **scheme.layer_config})
    return replanned(session, dataclasses.replace(session.config, scheme=changed)).plan


def _is_free(entry: PlanEntry) -> bool:
    return entry.layer.block is not None and not entry.layer.kept


def _grouped(layers: Sequence[str], joint: Sequence[tuple[str, ...]]) -> dict[str, list[str]]:
    """Returns group name -> layers, in model order.

    Args:
        joint: last parts of the names of layers that are joined.
    """
    found: dict[str, list[str]] = {}
    known = set(layers)
    for layer in layers:
        stem, _, leaf = layer.rpartition(".")
        name = layer
        if is_expert(layer):
            name = EXPERT.split(layer)[0] + ".experts.*"
        else:
            for members in joint:
                joined = [member for member in members if f"{stem}.{member}" in known]
                name = f"{stem}.{'/'.join(joined)}" if leaf in joined else name
        found.setdefault(name, []).append(layer)
    return found


def _pattern(name: str) -> str:
    return name if name.endswith(".experts.*") else ""


def _mixture(
    session: Session,
    options: Sequence[Option],
    members: Mapping[str, Sequence[str]],
    groups: Sequence[LayerGroup] | None = None,
) -> Plan:
    """Returns a plan in which options follow each other, group by group, to see whether formats hold them together."""
    chosen: dict[str, object] = {}
    for index, (name, layers) in enumerate(members.items()):
        allowed = list(range(len(options))) if groups is None else sorted(groups[index].costs)
        assert groups is None or groups[index].name == name
        chosen |= dict.fromkeys(layers, options[allowed[index % len(allowed)]].value)
    return _plan_with(session, chosen)


def _held(plan: Plan, exporters: Sequence[Exporter]) -> set[str]:
    """Returns the layers of a plan that every format holds, as far as single layers tell."""
    found = set()
    for entry in plan.quantized().values():
        head = plan.structure.head
        if any(exporter.capability.mismatches(entry, head) for exporter in exporters):
            continue
        layouts = [exporter.layout_for(entry.scheme, plan) for exporter in exporters]
        if not any(layout is not None and layout.refuses(entry.scheme, entry.layer.shape) for layout in layouts):
            found.add(entry.layer.name)
    return found


def _cost(entry: PlanEntry, config: MixedBitsConfig, exporters: Sequence[Exporter], plan: Plan) -> int:
    """Returns the bits of a layer: as its plan counts them, or for a size, as its widest format writes them."""
    if config.target_size is not None:
        return 8 * max(_stored_bytes(entry, exporter, plan) for exporter in exporters)
    size = math.prod(entry.layer.shape)
    return entry.scheme.bits * size if config.ignore_scale_zp_bits else round(entry.stored_bits * size)


def _stored_bytes(entry: PlanEntry, exporter: Exporter, plan: Plan) -> int:
    layout = exporter.layout_for(entry.scheme, plan) if entry.scheme.is_quantized else None
    if layout is None:  # written in 16 bits
        return 2 * math.prod(entry.layer.shape) + HEADER_BYTES
    specs = layout.specs(entry.scheme, entry.layer.shape).values()
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize + HEADER_BYTES for shape, dtype in specs)


def _with_budget(
    session: Session,
    options: tuple[Option, ...],
    groups: tuple[LayerGroup, ...],
    free: set[str],
    exporters: Sequence[Exporter],
    mixture: Plan,
) -> Choices:
    config = session.config.mixed
    others = [entry for entry in session.plan.entries if entry.layer.name not in free]
    if config.target_size is not None:
        fixed, total = _other_bits(session, free, exporters, mixture), 0
        budget = 8 * parse_size(config.target_size) - fixed
    else:
        assert config.target_bits is not None
        inside = [entry for entry in session.plan.entries if entry.layer.block is not None]
        total = sum(math.prod(entry.layer.shape) for entry in inside)
        fixed = sum(_cost(entry, config, exporters, mixture) for entry in others if entry.layer.block is not None)
        budget = math.floor(config.target_bits * total) - fixed
    least = sum(min(group.costs.values()) for group in groups)
    if least > budget:
        what = (
            f"target_size={config.target_size} (the smallest is {math.ceil((least + fixed) / 8e6)}MB)"
            if config.target_size is not None
            else f"target_bits={config.target_bits} (the least is {(least + fixed) / total + 5e-4:.3f}, scales counted)"
        )
        names = ", ".join(option.name for option in options)
        raise ConfigError(f"{what}: options {names} do not go lower. Raise it, or add a narrower option")
    return Choices(options, groups, budget, fixed, total)


def _other_bits(session: Session, free: set[str], exporters: Sequence[Exporter], mixture: Plan) -> int:
    """Returns the bits of everything in the files of weights that no option is chosen for."""
    source, config = session.source, session.config
    asked = getattr(torch, MODEL_DTYPES[config.model_dtype]) if config.model_dtype else None
    fixed = {e.layer.parameter: e for e in session.plan.quantized().values() if e.layer.name not in free}
    chosen = {f"{layer}.weight" for layer in free}
    total = 0
    for key, name in source.keys().items():
        if name in chosen:
            continue
        if name in fixed:
            total += max(_stored_bytes(fixed[name], exporter, mixture) for exporter in exporters)
            continue
        outline = source.outline(key)
        dtype = asked if asked is not None and outline.is_floating_point() else outline.dtype
        total += outline.numel() * dtype.itemsize + HEADER_BYTES
    stored = set(source.keys().values())
    for name, entry in fixed.items():  # an output layer that is tied in the original, and written by itself
        total += 0 if name in stored else max(_stored_bytes(entry, exporter, mixture) for exporter in exporters)
    return 8 * total


def describe_choices(choices: Choices) -> str:
    """Returns what there is to choose, as a table of options."""
    rows: list[tuple[str, ...]] = [("option", "groups", "bits of a weight")]
    for index, option in enumerate(choices.options):
        able = [group for group in choices.groups if index in group.costs]
        weights = max(1, sum(group.weights for group in able))
        rows.append((option.name, str(len(able)), f"{sum(group.costs[index] for group in able) / weights:.3f}"))
    budget, fixed = choices.budget / 8e6, choices.fixed / 8e6
    return f"{table(rows)}\nbudget of the groups: {budget:.1f} MB; everything else that counts: {fixed:.1f} MB"
