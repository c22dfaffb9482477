"""The stage before the blocks: measures sensitivities, chooses an option for each group, and makes that the plan.

What was chosen is kept in the work folder, so that an interrupted run goes on with it, and is a recipe, so that other
runs need not measure again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round import distributed
from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.config import MixedBitsConfig, SchemeConfig
from auto_round.formats import Exporter
from auto_round.memory import release_freed
from auto_round.mixed_bits.allocation import allocate
from auto_round.mixed_bits.choices import Choices, find_choices
from auto_round.mixed_bits.sensitivity import Part, sensitivities
from auto_round.plan import table
from auto_round.schemes import QuantizationScheme
from auto_round.session import Session, fingerprint, load_data, replanned
from auto_round.store import CHOSEN_FILE

logger = logging.getLogger(__name__)

LONGEST = 512  # tokens of a sample; more samples tell more than longer ones


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """What was measured and chosen.

    Attributes:
        options: index of the chosen option of each group.
        losses: of each group and option, in nats per token.
    """

    options: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]


def settle(
    session: Session,
    work: Path,
    exporters: Sequence[Exporter],
    open_stream: Callable[[Session, CalibrationSet], BlockStream],
    *,
    seed: int,
) -> Session:
    """Returns a session whose plan has the chosen option for each group; the same one if nothing is to be chosen.

    Args:
        work: folder that the choice is kept in; on resume it is taken from there.
        open_stream: gives the blocks for some calibration samples.
    Raises:
        ConfigError, UnsupportedError: as `find_choices`, before any work; as `sensitivities`.
    """
    if session.is_settled:
        return session
    choices = find_choices(session, exporters)
    data = load_data(session)
    session = dataclasses.replace(session, data=data)
    # Through JSON, as it is read back.
    key = json.loads(json.dumps({"run": fingerprint(session, data), "asked": _asked(session, choices)}, default=str))
    chosen = _stored(work, key) if session.config.resume else None
    if chosen is None:
        chosen = _choose(session, choices, data, open_stream, seed)
        if distributed.is_writer():
            work.mkdir(parents=True, exist_ok=True)
            record = {"key": key, **dataclasses.asdict(chosen)}
            (work / CHOSEN_FILE).write_text(json.dumps(record), encoding="utf-8")
    distributed.barrier()
    logger.info("%s", describe_chosen(choices, chosen))
    return _settled(session, choices, chosen)


def _choose(
    session: Session,
    choices: Choices,
    data: CalibrationSet,
    open_stream: Callable[[Session, CalibrationSet], BlockStream],
    seed: int,
) -> Chosen:
    started = time.monotonic()
    stream = open_stream(session, some_of(data, session.config.mixed.sensitivity_samples))
    transposed = frozenset(entry.layer.parameter for entry in session.plan.entries if entry.layer.transposed)
    losses = sensitivities(stream, _parts(choices), transposed, torch.Generator().manual_seed(seed))
    del stream
    release_freed()
    able = [sorted(group.costs) for group in choices.groups]
    costs = [[group.costs[index] for index in own] for group, own in zip(choices.groups, able, strict=True)]
    own_losses = [[row[index] for index in own] for row, own in zip(losses, able, strict=True)]
    picked = allocate(costs, own_losses, choices.budget)
    passed = time.monotonic() - started
    logger.info("chose among %d options for %d groups in %.1f s", len(choices.options), len(able), passed)
    return Chosen(
        tuple(own[index] for own, index in zip(able, picked, strict=True)), tuple(tuple(row) for row in losses)
    )


def _parts(choices: Choices) -> list[Part]:
    parts = []
    for group in choices.groups:
        weights = tuple(f"{layer}.weight" for layer in group.layers)
        schemes = (
            tuple(entry.scheme for entry in group.entries[index]) if index in group.entries else None
            for index in range(len(choices.options))
        )
        parts.append(Part(weights, tuple(schemes)))
    return parts


def some_of(data: CalibrationSet, count: int) -> CalibrationSet:
    """Returns at most so many of the samples, evenly spread; text is cut, samples with pictures are not."""
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long()
    mask = data.attention_mask
    # Where padding stands in front, nothing real may be left of a sample that is cut.
    whole = data.media is not None or (mask is not None and not bool(mask[rows, :LONGEST].any(1).all()))
    longest = data.input_ids.shape[1] if whole else LONGEST
    mask = None if mask is None else mask[rows, :longest]
    media = None if data.media is None else tuple(data.media[row] for row in rows.tolist())
    return CalibrationSet(data.input_ids[rows, :longest], mask, media)


def _asked(session: Session, choices: Choices) -> dict[str, Any]:
    return {
        "options": [option.value for option in choices.options],
        "budget": choices.budget,
        "costs": [sorted(group.costs.items()) for group in choices.groups],
        "samples": session.config.mixed.sensitivity_samples,
    }


def _stored(work: Path, key: Mapping[str, Any]) -> Chosen | None:
    """Returns what an interrupted run chose, None if it asked for something else."""
    file = work / CHOSEN_FILE
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["key"] != key:
        return None
    logger.info("mixed bits: as the interrupted run chose")
    return Chosen(tuple(record["options"]), tuple(tuple(row) for row in record["losses"]))


def _settled(session: Session, choices: Choices, chosen: Chosen) -> Session:
    """Returns the session as the recipe of what was chosen would make it."""
    layers: dict[str, Any] = {}
    for group, index in zip(choices.groups, chosen.options, strict=True):
        if index or session.plan.prescribed_by is not None:
            names = (group.pattern,) if group.pattern else group.layers
            layers |= dict.fromkeys(names, choices.options[index].value)
    scheme = session.config.scheme
    scheme = dataclasses.replace(scheme, layer_config={**layers, **scheme.layer_config})
    if session.plan.prescribed_by is None:
        scheme = dataclasses.replace(scheme, scheme=choices.options[0].value)
    config = dataclasses.replace(session.config, scheme=scheme, mixed=MixedBitsConfig())
    recipe = _plain(scheme) | ({"format": config.format} if session.plan.prescribed_by is not None else {})
    return dataclasses.replace(replanned(session, config), recipe=recipe)


def _plain(scheme: SchemeConfig) -> dict[str, Any]:
    """Returns the options of a scheme config that are not defaults, as JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, QuantizationScheme):
            return value.to_dict()
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, Mapping) else value

    default = SchemeConfig()
    names = [field.name for field in dataclasses.fields(scheme)]
    return {name: plain(getattr(scheme, name)) for name in names if getattr(scheme, name) != getattr(default, name)}


def describe_chosen(choices: Choices, chosen: Chosen) -> str:
    """Returns the choice as a table: group, option, bits of a weight, expected divergence under each option."""
    names = [option.name for option in choices.options]
    rows: list[tuple[str, ...]] = [("layers", "becomes", "bits", *(f"KL {name}" for name in names))]
    for group, index, losses in zip(choices.groups, chosen.options, chosen.losses, strict=True):
        bits = group.costs[index] / group.weights
        shown = [f"{loss:.6f}" if i in group.costs else "-" for i, loss in enumerate(losses)]
        rows.append((group.name, names[index], f"{bits:.2f}", *shown))
    cost = sum(group.costs[index] for group, index in zip(choices.groups, chosen.options, strict=True))
    loss = sum(row[index] for row, index in zip(chosen.losses, chosen.options, strict=True))
    mean = f"{(cost + choices.fixed) / choices.total:.3f} bits a weight" if choices.total else ""
    size = f"{(cost + choices.fixed) / 8e6:.1f} MB"
    return f"{table(rows)}\nmixed bits: {mean or size}, expected divergence {loss:.5f} nats a token"
