"""Quantizes a model block by block: activations go from one to the next, results go into the store.

One group of blocks is in memory at a time; the next one is read while it is tuned, the one before written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round import distributed, end_to_end
from auto_round.background import Background
from auto_round.blocks import Block, BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.channels import ChannelSums, sums_of
from auto_round.device import compute_device, compute_dtype
from auto_round.formats.export import HEAD_BLOCK
from auto_round.formats.gguf.importance import MeasuredImportance
from auto_round.memory import release_freed
from auto_round.outside import OutsideInputs, output_layers, round_outside
from auto_round.plan import Plan
from auto_round.progress import Progress
from auto_round.schemes import QuantizationScheme
from auto_round.session import Session
from auto_round.store import RunStore
from auto_round.tensors import BlockResult, QuantizedTensor
from auto_round.tuning import (
    Tuner,
    TuningTask,
    quantizers_of,
    round_plain,
    round_searched,
    tune,
    tuner_for,
    with_input_quantizers,
)
from auto_round.tuning.base import joined_peaks
from auto_round.tuning.block_bytes import Choice
from auto_round.tuning.kv_cache import cache_scales
from auto_round.tuning.memory_budget import MemoryBudget
from auto_round.tuning.statistics import channel_sums

logger = logging.getLogger(__name__)


def round_everything(session: Session, store: RunStore) -> None:
    """Rounding needs no activations where it is plain, or where an importance matrix was given.

    Weights are read, rounded and stored one block after the other.
    """
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
                weight = stored[name].to(device)
                weight = weight.t() if entry.layer.transposed else weight
                rounded = _rounded(session, name, weight, entry.scheme, peaks.get(name))
                weights[name] = rounded.to("cpu")
            store.save(group[0], BlockResult(weights))
            del stored, weights
        release_freed()
        progress.report(group[0], BlockResult({}))
    given = session.config.calib.imatrix is not None
    inputs = OutsideInputs(None, session.importance) if given else None
    round_outside(plan, source, store, session.config, inputs)


def _rounded(
    session: Session, name: str, weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None
) -> QuantizedTensor:
    """Returns a weight rounded plainly, or with scales searched under the importance matrix that was given."""
    if session.config.calib.imatrix is None:
        return round_plain(weight_OI, scheme, tensor_peak)
    seen = session.importance.get(name)
    return round_searched(weight_OI, scheme, None if seen is None else seen.to(weight_OI.device), tensor_peak)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """What goes along from block to block."""

    session: Session
    store: RunStore
    stream: BlockStream
    tuner: Tuner
    budget: MemoryBudget
    progress: Progress
    reader: Background
    writer: Background
    measured: MeasuredImportance | None


def tune_everything(session: Session, store: RunStore, data: CalibrationSet) -> None:
    """Tunes, or rounds under the importance of channels, what the store does not have yet."""
    config, plan = session.config, session.plan
    measured = MeasuredImportance() if config.calib.write_imatrix is not None else None
    outside_left = bool(plan.outside()) and (measured is not None or not store.has(HEAD_BLOCK))
    if all(store.has(group[0]) for group in plan.groups) and not outside_left and measured is None:
        return
    tuner = tuner_for(config.tune, [entry.scheme for entry in plan.quantized().values()])
    has_two = config.tune.enable_quanted_input and tuner.needs_targets
    chains = 3 if has_two and tuner.needs_original_inputs else 2
    budget = MemoryBudget(config, compute_device(config.device), chains)
    stream = open_stream(session, data, quantized_chain=has_two, budget=budget)
    end_to_end.check_stream(stream, config)
    with Background() as reader, Background() as writer:
        walk = _Walk(session, store, stream, tuner, budget, Progress(len(plan.groups)), reader, writer, measured)
        stored = None
        for index in range(len(plan.groups)):
            last = index == len(plan.groups) - 1 and not outside_left
            # In a function of its own, so that nothing of a block stays while the next one is tuned.
            stored = _pass_block(walk, index, stored, last=last)
            release_freed()
    if outside_left:
        means = {**stream.channel_means, **session.importance}
        round_outside(plan, session.source, store, config, OutsideInputs(_head_inputs(stream, plan), means))
    if measured is not None and distributed.is_writer():
        seen = _head_inputs(stream, plan, stream.original) if outside_left else None
        _write_importance(session, measured, seen, data)


def _write_importance(
    session: Session, measured: MeasuredImportance, head: Tensor | None, data: CalibrationSet
) -> None:
    config, plan = session.config.calib, session.plan
    if head is not None:
        measured.add(dict.fromkeys(output_layers(plan), sums_of(head)))
    assert config.write_imatrix is not None
    dataset = config.dataset if isinstance(config.dataset, str) else "calibration"
    measured.write(
        config.write_imatrix, session.source, plan.structure, samples=tuple(data.input_ids.shape), dataset=dataset
    )
    logger.info("wrote the importance matrix to %s", config.write_imatrix)


def _head_inputs(stream: BlockStream, plan: Plan, chain_NTH: Tensor | None = None) -> Tensor | None:
    """Returns (R, H) what the output layer sees at real tokens, None if it is not quantized.

    Args:
        chain_NTH: what the last block gives; None: as the quantized blocks give it.
    """
    head, mask = plan.structure.head, stream.data.attention_mask
    if head is None or not output_layers(plan):
        return None
    seen = stream.head_inputs(head, stream.quantized if chain_NTH is None else chain_NTH)
    return seen.flatten(0, -2) if mask is None else seen[mask.to(seen.device)]


def _pass_block(
    walk: _Walk, index: int, stored: Mapping[str, Tensor] | None, *, last: bool
) -> Mapping[str, Tensor] | None:
    """Quantizes one group of blocks, or takes its result from the store, and moves the activations past it.

    Args:
        stored: the group's tensors, if they have been read already.
    Returns:
        The tensors of the next group, read meanwhile.
    """
    session, store, stream = walk.session, walk.store, walk.stream
    block, name = stream.load(index, stored), session.plan.groups[index][0]
    if index + 1 < len(session.plan.groups):
        walk.reader.begin(stream.read, index + 1)
    done = store.has(name)
    if walk.measured is not None:
        walk.measured.add(_inputs_of(session, stream, block))
    schemes = {name: entry.scheme for name, entry in session.plan.in_group(block.names).items()}
    choice = walk.budget.choose(stream, block, schemes)
    _follow(choice, stream)
    targets_NTH = None
    if walk.tuner.needs_targets or not last:
        targets_NTH = stream.targets(block, keeps_inputs=walk.tuner.needs_original_inputs)
    result = store.load(name) if done else _tune_within_memory(walk, block, targets_NTH, choice)
    if not done:
        result = _with_cache_scales(session, stream, block, result)
        if distributed.is_writer():
            walk.writer.begin(store.save, name, result)
    distributed.barrier()
    following = walk.reader.result()
    if not last:
        assert targets_NTH is not None
        quantized = with_input_quantizers(block, quantizers_of(result))
        replaced = _replaced(session, block, result) if stream.quantized_chain else {}
        stream.advance(quantized, stream.stored(targets_NTH), replaced)
    walk.progress.report(block.name, result, resumed=done)
    return following


def _inputs_of(session: Session, stream: BlockStream, block: Block) -> dict[str, ChannelSums]:
    """Returns what the linear layers of a block see in the original model."""
    linears = (linear.parameter for linear in session.plan.structure.linears)
    inside = [name for name in linears if name.startswith(tuple(f"{one}." for one in block.names))]
    assert stream.original is not None
    return channel_sums(block, stream.original, stream.passes(), inside, mask_NT=stream.data.attention_mask)


def _follow(choice: Choice, stream: BlockStream) -> None:
    stream.keep_on(torch.device("cpu") if choice.on_host else stream.device)
    stream.micro_batch = choice.micro_batch


def _tune_within_memory(walk: _Walk, block: Block, targets_NTH: Tensor | None, choice: Choice) -> BlockResult:
    """Returns what tuning a block gives; where memory does not suffice after all, the block begins anew with less."""
    wanted: Choice | None = choice
    while wanted is not None:
        choice = wanted
        try:
            return _tune_block(walk, block, targets_NTH, choice)
        except torch.cuda.OutOfMemoryError as error:
            wanted, message = walk.budget.smaller(choice), str(error).splitlines()[0]
            if wanted is None:
                raise
        # Behind the handler, so that nothing of the failed attempt is held by its traceback.
        logger.warning("%s: %s. Once more with %s", block.name, message, wanted.describe())
        _follow(wanted, walk.stream)
        targets_NTH = None if targets_NTH is None else walk.stream.stored(targets_NTH)
        torch.cuda.empty_cache()
    raise AssertionError


def open_stream(
    session: Session,
    data: CalibrationSet,
    *,
    quantized_chain: bool,
    budget: MemoryBudget | None = None,
    other_bytes: int = 0,
) -> BlockStream:
    """Returns the stream of a session's blocks, its activations where there is room for them.

    Args:
        quantized_chain: as in `BlockStream`.
        budget: None for one of two chains.
        other_bytes: what will be kept where the activations are.
    """
    config = session.config
    device = compute_device(config.device)
    stored = next((p.dtype for p in session.source.model.parameters() if p.is_floating_point()), torch.float32)
    dtype = compute_dtype(device, stored, amp=config.tune.amp)
    hidden = session.plan.entries[0].layer.shape[1]
    budget = MemoryBudget(config, device, chains=2) if budget is None else budget
    on_host = budget.starts_on_host(data.input_ids.numel() * hidden * dtype.itemsize, other_bytes)
    return BlockStream(
        session.source,
        session.plan.groups,
        data,
        device=device,
        dtype=dtype,
        storage=torch.device("cpu") if on_host else device,
        batch_size=config.tune.batch_size,
        quantized_chain=quantized_chain,
        watched=_watched(session.plan),
        shows_all_experts=config.calib.calibrate_all_experts,
    )


def _watched(plan: Plan) -> list[str]:
    """Returns the linear layers outside the blocks but the output layer; an embedding sees tokens, no channels."""
    linear = {layer.parameter for layer in plan.structure.linears}
    return [n for n, e in plan.outside().items() if n in linear and e.layer.name != plan.structure.head]


def _tune_block(walk: _Walk, block: Block, targets_NTH: Tensor | None, choice: Choice) -> BlockResult:
    session, stream = walk.session, walk.stream
    entries = session.plan.in_group(block.names)
    task = TuningTask(
        block=dataclasses.replace(block, recomputes=choice.recomputes),
        schemes={name: entry.scheme for name, entry in entries.items()},
        transposed=frozenset(name for name, entry in entries.items() if entry.layer.transposed),
        inputs=stream.quantized,
        original_inputs=stream.original,
        targets=targets_NTH,
        mask=stream.data.attention_mask,
        batches=stream.passes(),
        seed=block_seed(session.config.tune.seed, block.names[0]),
        micro_batch=choice.micro_batch,
        importance={n: session.importance[n].to(block.device) for n in entries if n in session.importance},
    )
    result = tune(task, session.config.tune) if entries else BlockResult({})
    return dataclasses.replace(result, weights={name: weight.to("cpu") for name, weight in result.weights.items()})


def _with_cache_scales(session: Session, stream: BlockStream, block: Block, result: BlockResult) -> BlockResult:
    """Returns the result with scales for an FP8 key/value cache, if they were asked for."""
    if not session.plan.has_cache_scales:
        return result
    quantized = with_input_quantizers(block, quantizers_of(result))
    scales = cache_scales(quantized, stream.quantized, stream.passes(), _replaced(session, block, result))
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
