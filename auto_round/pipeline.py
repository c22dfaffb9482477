"""The straight line of a run: read the structure, resolve the plan, quantize block by block, write every format.

Both the command line and the API end here. State lives in the block stream (activations) and in the store (results).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round import distributed, end_to_end
from auto_round.blocks import Block, BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.config import parse_formats
from auto_round.device import compute_device, compute_dtype, repeatable_kernels
from auto_round.formats import FormatTarget, export, verify
from auto_round.formats.export import HEAD_BLOCK, checked_targets
from auto_round.memory import release_freed
from auto_round.outside import OutsideInputs, output_layers, round_outside
from auto_round.plan import Plan
from auto_round.progress import Progress
from auto_round.session import Session, fingerprint, load_data
from auto_round.store import RunStore
from auto_round.tensors import BlockResult
from auto_round.tuning import (
    Tuner,
    TuningTask,
    quantizers_of,
    round_plain,
    tune,
    tuner_for,
    with_input_quantizers,
)
from auto_round.tuning.base import joined_peaks
from auto_round.tuning.kv_cache import cache_scales

logger = logging.getLogger(__name__)

WORK_FOLDER = ".auto_round_work"


@dataclasses.dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gives.

    Attributes:
        folders: one per format.
        summaries: block name -> losses, kept step and notes.
        seconds: wall time of quantization, without export.
    """

    folders: tuple[Path, ...]
    summaries: dict[str, dict[str, Any]]
    seconds: float


def format_targets(session: Session) -> list[FormatTarget]:
    """Returns the formats of a run and their folders, each checked against the plan."""
    config = session.config
    return checked_targets(parse_formats(config.format), Path(config.output_dir), session.plan, session.source)


def run(session: Session) -> RunResult:
    """Quantizes and writes every format. The work folder is removed at the end unless it was named."""
    config = session.config
    wanted = format_targets(session)
    work = Path(config.work_dir) if config.work_dir else Path(config.output_dir) / WORK_FOLDER
    started = time.monotonic()
    store = quantize(session, work)
    seconds = time.monotonic() - started
    summaries = {name: store.load(name).summary() for name in store.finished()}
    if distributed.is_writer():
        for target in wanted:
            write(session, target, store)
        if not config.work_dir:
            store.remove()
    distributed.barrier()
    return RunResult(tuple(target.folder for target in wanted), summaries, seconds)


def write(session: Session, target: FormatTarget, store: RunStore) -> None:
    """Writes one format, then reopens and checks it unless told not to.

    Raises:
        VerificationError: what was written is not what was quantized.
    """
    exporter, folder, config = target.exporter, target.folder, session.config
    export(exporter, folder, session.plan, session.source, store, config, session.tokenizer)
    if session.source.folder is None and session.processor is not None:
        session.processor.save_pretrained(folder)
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
    needs_calibration = plan.needs_calibration or (config.tune.needs_calibration and bool(plan.quantized()))
    steps = end_to_end.steps_of(config, plan)
    data = load_data(session) if needs_calibration or steps else None
    store = _open_store(work, session, data)
    with repeatable_kernels():
        if data is None or not needs_calibration:
            _round_everything(session, store)
        else:
            _tune_everything(session, store, data)
        distributed.barrier()
        if data is not None and steps:
            opened = functools.partial(_open_stream, session, data, quantized_chain=False)
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


def _round_everything(session: Session, store: RunStore) -> None:
    """Plain rounding needs no activations: weights are read, rounded and stored one block after the other."""
    plan, source = session.plan, session.source
    device = compute_device(session.config.device)
    progress = Progress(len(plan.groups))
    for group in plan.groups:
        if not store.has(group[0]) and distributed.is_writer():
            entries = plan.in_group(group)
            stored: dict[str, Tensor] = {}
            for name in group:
                stored.update(source.tensors(name))
            schemes = {name: entry.scheme for name, entry in entries.items()}
            weights, peaks = {}, joined_peaks({name: stored[name] for name in entries}, schemes)
            for name, entry in entries.items():
                weight = stored[name].to(device).float()
                weight = weight.t() if entry.layer.transposed else weight
                weights[name] = round_plain(weight, entry.scheme, peaks.get(name)).to("cpu")
            store.save(group[0], BlockResult(weights))
            del stored, weights
        release_freed()
        progress.report(group[0], BlockResult({}))
    round_outside(plan, source, store, session.config)


def _tune_everything(session: Session, store: RunStore, data: CalibrationSet) -> None:
    config, plan = session.config, session.plan
    outside_left = bool(plan.outside()) and not store.has(HEAD_BLOCK)
    if all(store.has(group[0]) for group in plan.groups) and not outside_left:
        return
    tuner = tuner_for(config.tune)
    stream = _open_stream(session, data, quantized_chain=config.tune.enable_quanted_input and tuner.needs_targets)
    end_to_end.check_stream(stream, config)
    progress = Progress(len(plan.groups))
    for index in range(len(plan.groups)):
        last = index == len(plan.groups) - 1 and not outside_left
        # In a function of its own, so that nothing of a block stays while the next one is tuned.
        _pass_block(session, store, stream, index, progress, tuner, last=last)
        release_freed()
    if outside_left:
        inputs = OutsideInputs(_head_inputs(stream, plan), stream.channel_means)
        round_outside(plan, session.source, store, config, inputs)


def _head_inputs(stream: BlockStream, plan: Plan) -> Tensor | None:
    """Returns (R, H) what the output layer sees at real tokens, None if it is not quantized."""
    head, mask = plan.structure.head, stream.data.attention_mask
    if head is None or not output_layers(plan):
        return None
    seen = stream.head_inputs(head, stream.quantized)
    return seen.flatten(0, -2) if mask is None else seen[mask.to(seen.device)]


def _pass_block(
    session: Session,
    store: RunStore,
    stream: BlockStream,
    index: int,
    progress: Progress,
    tuner: Tuner,
    *,
    last: bool,
) -> None:
    """Quantizes one group of blocks, or takes its result from the store, and moves the activations past it."""
    block, name = stream.load(index), session.plan.groups[index][0]
    done = store.has(name)
    assert stream.original is not None
    targets_NTH = stream.run(block, stream.original) if tuner.needs_targets or not last else None
    if not tuner.needs_original_inputs:
        stream.forget_original()
    result = store.load(name) if done else _tune_block(session, stream, block, targets_NTH)
    if not done:
        result = _with_cache_scales(session, stream, block, result)
        if distributed.is_writer():
            store.save(name, result)
    distributed.barrier()
    if not last:
        assert targets_NTH is not None
        quantized = with_input_quantizers(block, quantizers_of(result))
        replaced = _replaced(session, block, result) if stream.quantized_chain else {}
        stream.advance(quantized, targets_NTH, replaced)
    progress.report(block.name, result, resumed=done)


def _open_stream(session: Session, data: CalibrationSet, *, quantized_chain: bool) -> BlockStream:
    config = session.config
    device = compute_device(config.device)
    stored = next((p.dtype for p in session.source.model.parameters() if p.is_floating_point()), torch.float32)
    return BlockStream(
        session.source,
        session.plan.groups,
        data,
        device=device,
        dtype=compute_dtype(device, stored, amp=config.tune.amp),
        storage=torch.device("cpu") if config.low_gpu_mem_usage else device,
        batch_size=config.tune.batch_size,
        quantized_chain=quantized_chain,
        watched=[n for n, e in session.plan.outside().items() if e.layer.name != session.plan.structure.head],
        shows_all_experts=config.calib.calibrate_all_experts,
    )


def _tune_block(session: Session, stream: BlockStream, block: Block, targets_NTH: Tensor | None) -> BlockResult:
    entries = session.plan.in_group(block.names)
    task = TuningTask(
        block=block,
        schemes={name: entry.scheme for name, entry in entries.items()},
        transposed=frozenset(name for name, entry in entries.items() if entry.layer.transposed),
        inputs=stream.quantized,
        original_inputs=stream.original,
        targets=targets_NTH,
        mask=stream.data.attention_mask,
        batches=stream.batches(),
        seed=block_seed(session.config.tune.seed, block.names[0]),
    )
    result = tune(task, session.config.tune) if entries else BlockResult({})
    return dataclasses.replace(result, weights={name: weight.to("cpu") for name, weight in result.weights.items()})


def _with_cache_scales(session: Session, stream: BlockStream, block: Block, result: BlockResult) -> BlockResult:
    """Returns the result with scales for an FP8 key/value cache, if they were asked for."""
    if not session.plan.has_cache_scales:
        return result
    quantized = with_input_quantizers(block, quantizers_of(result))
    scales = cache_scales(quantized, stream.quantized, stream.batches(), _replaced(session, block, result))
    return dataclasses.replace(result, cache_scales={name: scale.to("cpu") for name, scale in scales.items()})


def _replaced(session: Session, block: Block, result: BlockResult) -> dict[str, Tensor]:
    """Returns what the quantized block runs with, on the compute device."""
    transposed = {entry.layer.parameter for entry in session.plan.entries if entry.layer.transposed}
    replaced = {}
    for name, weight in result.weights.items():
        dense = weight.to(block.device).dequantize()
        replaced[name] = (dense.t() if name in transposed else dense).to(block.dtype)
    replaced.update({name: tensor.to(block.device, block.dtype) for name, tensor in result.plain.items()})
    return replaced


def block_seed(seed: int, name: str) -> int:
    """Returns a seed that depends on the run's seed and the block's name only, not on the order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")


def _open_store(work: Path, session: Session, data: CalibrationSet | None) -> RunStore:
    if not distributed.is_writer():
        distributed.barrier()
        return RunStore.existing(work)
    store = RunStore(work, fingerprint(session, data), resume=session.config.resume)
    end_to_end.drop_other(store, session.config)
    distributed.barrier()
    return store
