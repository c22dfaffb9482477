"""The straight line of a run: read the structure, resolve the plan, quantize block by block, write every format.

Both the command line and the API end here. State lives in the block stream (activations) and in the store (results).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round import distributed, end_to_end, quality
from auto_round.blockwise import block_seed, open_stream, round_everything, tune_everything
from auto_round.calibration import CalibrationSet
from auto_round.device import repeatable_kernels
from auto_round.formats import FormatTarget, export, verify
from auto_round.formats.base import targets
from auto_round.formats.export import check_not_source, checked_targets
from auto_round.mixed_bits import describe_choices, find_choices, settle
from auto_round.model_free import round_folder
from auto_round.option_values import parse_formats
from auto_round.plan import Plan, describe
from auto_round.recipes import write_recipe
from auto_round.session import Session, fingerprint, load_data
from auto_round.store import RunStore

logger = logging.getLogger(__name__)

WORK_FOLDER = ".auto_round_work"
RECIPE_FILE = "mixed_bits_recipe.json"


@dataclasses.dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gives.

    Attributes:
        folders: one per format.
        summaries: block name -> losses, kept step and notes.
        seconds: wall time of quantization, without export.
        measured: what was lost; None if no report was asked for.
    """

    folders: tuple[Path, ...]
    summaries: dict[str, dict[str, Any]]
    seconds: float
    measured: quality.Measured | None = None


def format_targets(session: Session) -> list[FormatTarget]:
    """Returns the formats of a run and their folders, each checked against the plan."""
    config = session.config
    names, folder = parse_formats(config.format), Path(config.output_dir)
    if session.is_settled:
        return checked_targets(names, folder, session.plan, session.source)
    wanted = targets(names, folder)
    find_choices(session, [target.exporter for target in wanted])
    for target in wanted:
        check_not_source(target.folder, session.source)
    return wanted


def settled(session: Session, work: Path, names: Sequence[str] | None = None) -> Session:
    """Returns a session with its final plan: where options are to be chosen among, they are measured and chosen here.

    Args:
        work: folder that the choice is kept in.
        names: formats that must hold it; None: those of the session.
    """
    wanted = targets(tuple(names or parse_formats(session.config.format)), Path(session.config.output_dir))
    opened = functools.partial(open_stream, quantized_chain=False)
    seed = block_seed(session.config.tune.seed, "mixed_bits")
    with repeatable_kernels():
        return settle(session, work, [target.exporter for target in wanted], opened, seed=seed)


def describe_plan(session: Session) -> str:
    """Returns what becomes of each weight, or, while that is to be chosen, what there is to choose."""
    if session.is_settled:
        return describe(session.plan)
    wanted = targets(parse_formats(session.config.format), Path(session.config.output_dir))
    return describe_choices(find_choices(session, [target.exporter for target in wanted]))


def run(session: Session) -> RunResult:
    """Quantizes and writes every format. The work folder is removed at the end unless it was named."""
    config = session.config
    wanted = format_targets(session)
    work = Path(config.work_dir) if config.work_dir else Path(config.output_dir) / WORK_FOLDER
    if config.model_free:
        seconds = round_folder(session, wanted) if distributed.is_writer() else 0.0
        distributed.barrier()
        return RunResult(tuple(target.folder for target in wanted), {}, seconds)
    started = time.monotonic()
    if not session.is_settled:
        session = settled(session, work)
        wanted = format_targets(session)
    store = quantize(session, work)
    seconds = time.monotonic() - started
    summaries = block_summaries(store)  # before the writer removes what the other ranks read
    if distributed.is_writer():
        for target in wanted:
            write(session, target, store)
    distributed.barrier()
    measured = measure_quality(session, store)
    if distributed.is_writer():
        if measured is not None:
            write_reports(session, wanted, summaries, measured)
        if not config.work_dir:
            store.remove()
    distributed.barrier()
    return RunResult(tuple(target.folder for target in wanted), summaries, seconds, measured)


def block_summaries(store: RunStore) -> dict[str, dict[str, Any]]:
    """Returns block name -> losses, kept step and notes; reads every block."""
    return {name: store.load(name).summary() for name in store.finished()}


def measure_quality(session: Session, store: RunStore) -> quality.Measured | None:
    """Returns what quantization cost, measured on held-out text if there is any; None if no report is wanted.

    All ranks take part. The session's source still has to give the original weights.
    """
    if not session.config.report:
        return None
    with repeatable_kernels():
        return quality.measure(session, store, functools.partial(open_stream, quantized_chain=False))


def write_reports(
    session: Session,
    targets: Sequence[FormatTarget],
    summaries: Mapping[str, dict[str, Any]],
    measured: quality.Measured,
) -> None:
    """Writes the quality report beside the weights of each format.

    Args:
        summaries: what `block_summaries` gave.
    """
    for target in targets:
        quality.write_report(target, quality.record(session, target, summaries, measured))


def write(session: Session, target: FormatTarget, store: RunStore) -> None:
    """Writes one format, then reopens and checks it unless told not to.

    Raises:
        VerificationError: what was written is not what was quantized.
    """
    exporter, folder, config = target.exporter, target.folder, session.config
    quality.remove_report(folder)
    export(exporter, folder, session.plan, session.source, store, config, session.tokenizer)
    if session.source.folder is None and session.processor is not None:
        session.processor.save_pretrained(folder)
    if session.recipe is not None:
        write_recipe(folder / RECIPE_FILE, session.recipe, "What was chosen for each layer. --recipe takes this file.")
    logger.info("wrote %s to %s", exporter.name, folder)
    if config.verify:
        verify(exporter, folder, plan=session.plan, source=session.source, store=store, config=config)


def quantize(session: Session, work: Path) -> RunStore:
    """Returns a store with a result for every block; blocks that an interrupted run finished are kept on `resume`."""
    config, plan, source = session.config, session.plan, session.source
    for adjustment in plan.adjustments:
        logger.info("changed: %s", adjustment)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    needs_calibration, steps = session.needs_calibration, end_to_end.steps_of(config, plan)
    data = load_data(session) if needs_calibration or steps else None
    store = _open_store(work, session, data)
    if config.report and distributed.is_writer():
        quality.hold_out(session, data, store)
    with repeatable_kernels():
        if data is None or not needs_calibration:
            round_everything(session, store)
        else:
            tune_everything(session, store, data)
        distributed.barrier()
        if data is not None and steps:
            codes = sum(math.prod(entry.layer.shape) for entry in plan.quantized().values())
            opened = functools.partial(open_stream, session, data, quantized_chain=False, other_bytes=codes)
            seed = block_seed(config.tune.seed, "end_to_end")
            end_to_end.tune_scales(plan, store, config, opened, steps=steps, seed=seed)
    assert all(store.has(group[0]) for group in plan.groups), source
    return store


def dequantized(store: RunStore, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yields parameter name and float32 value of every weight that quantization changed, as the model stores it."""
    transposed = {entry.layer.parameter for entry in plan.entries if entry.layer.transposed}
    for block in store.finished():
        result = store.load(block)
        for name, weight in result.weights.items():
            dense = weight.dequantize()
            yield name, dense.t() if name in transposed else dense
        yield from result.plain.items()


def _open_store(work: Path, session: Session, data: CalibrationSet | None) -> RunStore:
    if not distributed.is_writer():
        distributed.barrier()
        return RunStore.existing(work)
    store = RunStore(work, fingerprint(session, data), resume=session.config.resume)
    end_to_end.drop_other(store, session.config)
    distributed.barrier()
    return store
