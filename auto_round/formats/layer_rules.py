"""Which layers are quantized and how, in the words of GPTQ and AWQ configs: rules of regular expressions, name lists.

A regular expression here matches exactly the layers it was made for, so the order of rules does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from auto_round.plan import FUSED_GROUPS, Plan
from auto_round.schemes import QuantizationScheme

# Name under which serving engines look up layers that they join. Source: packed_modules_mapping in vLLM and SGLang.
FUSED_NAMES = dict(zip(FUSED_GROUPS, ("qkv_proj", "gate_up_proj", "w13"), strict=True))

# Scheme fields of a layer that differ from the base.
Changes = tuple[tuple[str, Any], ...]


def most_common_scheme(plan: Plan, fields: Sequence[str]) -> QuantizationScheme:
    """Returns the scheme whose values in `fields` most quantized layers have; the base wins a tie."""
    groups: dict[tuple[Any, ...], list[QuantizationScheme]] = {}
    for entry in plan.quantized().values():
        groups.setdefault(tuple(getattr(entry.scheme, field) for field in fields), []).append(entry.scheme)
    base = tuple(getattr(plan.base, field) for field in fields)
    return groups[max(groups, key=lambda values: (len(groups[values]), values == base))][0]


def dynamic_rules(plan: Plan, base: QuantizationScheme) -> dict[str, dict[str, Any]]:
    """Returns GPTQModel's `dynamic`: "-:regex" for layers in 16 bits, "+:regex" for those that differ from the base.

    Layers that are joined by serving engines are named by their joint name too, if all of them have the same rule.

    Args:
        base: the scheme of layers without a rule.
    """
    fields = ("bits", "group_size", "sym")
    said: dict[str, Changes | None] = {}
    for entry in plan.entries:
        scheme = entry.scheme
        if scheme.is_quantized:
            said[entry.layer.name] = tuple(
                (f, getattr(scheme, f)) for f in fields if getattr(scheme, f) != getattr(base, f)
            )
        elif entry.layer.block is not None:
            said[entry.layer.name] = None
    return _rules(said) | _rules_of_other_modules(plan)


def skip_rules(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns the rules of `dynamic` that concern layers in 16 bits."""
    said = {e.layer.name: () if e.scheme.is_quantized else None for e in plan.entries if e.layer.block is not None}
    return _rules(said) | _rules_of_other_modules(plan)


def _rules(said: Mapping[str, Changes | None]) -> dict[str, dict[str, Any]]:
    """Returns a rule for each layer whose entry is not empty; None means 16 bits."""
    said = dict(said)
    for stem, members, joint in _fused(said):
        values = {said[f"{stem}.{member}"] for member in members}
        said[f"{stem}.{joint}"] = values.pop() if len(values) == 1 else ()
    rules: dict[str, dict[str, Any]] = {}
    for value in dict.fromkeys(said.values()):
        if value == ():
            continue
        chosen = [name for name, other in said.items() if other == value]
        sign = "-:" if value is None else "+:"
        rules |= {f"{sign}{pattern}$": dict(value or ()) for pattern in patterns(chosen, said)}
    return rules


def _rules_of_other_modules(plan: Plan) -> dict[str, dict[str, Any]]:
    inside = _other_modules_in_blocks(plan)
    # Not shortened: "any number" would stand for the layers of the model too.
    extra = [re.escape(name) for name in plan.structure.extra_modules]
    return {rf"-:{pattern}(?:\..*)?$": {} for pattern in (*patterns(inside, inside), *extra)}


def patterns(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns regular expressions, few and short, that fully match all of `chosen` and nothing else of `known`.

    Names that differ in their numbers only share an expression.
    """
    wanted = set(chosen)
    families: dict[str, list[str]] = {}
    for name in known:
        families.setdefault(family_of(name), []).append(name)
    found = []
    for family, members in families.items():
        inside = [name for name in members if name in wanted]
        if not inside:
            continue
        if len(inside) == len(members):
            found.append(family)
            continue
        blocks: dict[str, list[str]] = {}
        for name in members:
            blocks.setdefault(_first_number(name), []).append(name)
        whole = [number for number, names in blocks.items() if all(name in wanted for name in names)]
        if whole:
            numbers = whole[0] if len(whole) == 1 else f"(?:{'|'.join(whole)})"
            found.append(family.replace(r"\d+", numbers, 1))
        found += [re.escape(name) for name in inside if _first_number(name) not in whole]
    return found


def skipped_modules(plan: Plan) -> list[str]:
    """Returns the linear layers in 16 bits, and what else lies in the blocks and has a matrix (routers, experts)."""
    linear = [entry.layer.name for entry in plan.entries if not entry.scheme.is_quantized]
    return [*linear, *other_modules(plan)]


def quantized_in_blocks(plan: Plan) -> list[str] | None:
    """Returns what is quantized, as names within a block if these tell it apart in all blocks, else as full names.

    None if every linear layer in the blocks is quantized. Engines look for these as parts of names.
    """
    inside = [entry for entry in plan.entries if entry.layer.block is not None]
    if all(entry.scheme.is_quantized for entry in inside):
        return None
    full = [entry.layer.name for entry in plan.entries if entry.scheme.is_quantized]
    short = list(dict.fromkeys(_within_block(plan, e.layer.name) for e in inside if e.scheme.is_quantized))
    hit = {entry.layer.name for entry in inside if any(name in entry.layer.name for name in short)}
    outside = [entry.layer.name for entry in plan.outside().values()]
    return [*short, *outside] if hit == set(full) - set(outside) else full


def other_modules(plan: Plan) -> list[str]:
    """Returns modules that hold matrices and are no linear layer of the model, where engines may take them for one.

    These are routers and fused experts in the blocks, and what the checkpoint holds besides the model.
    """
    return [*_other_modules_in_blocks(plan), *plan.structure.extra_modules]


def _other_modules_in_blocks(plan: Plan) -> list[str]:
    inside = tuple(block + "." for block in plan.structure.blocks)
    names = [name.rpartition(".")[0] for name in plan.structure.other_weights if name.startswith(inside)]
    return list(dict.fromkeys(names))


def _fused(names: Iterable[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """Returns (parent, members, joint name) of layers that are joined and all there."""
    known = set(names)
    stems = dict.fromkeys(name.rpartition(".")[0] for name in known)
    return [
        (stem, members, joint)
        for stem in sorted(stems)
        for members, joint in FUSED_NAMES.items()
        if all(f"{stem}.{member}" in known for member in members)
    ]


def family_of(name: str) -> str:
    """Returns a regular expression for all names that differ from this one in their numbers only."""
    parts = (r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
    return r"\.".join(parts)


def _first_number(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")


def _within_block(plan: Plan, name: str) -> str:
    return next(name.removeprefix(block + ".") for block in plan.structure.blocks if name.startswith(block + "."))
