"""The stage after the blocks: scales of all layers tuned together, so that the model predicts what the 16-bit one does.

Codes and zero points are fixed. Adam moves the logarithms of scales along the gradient of KL(16-bit || quantized) over
the calibration text. Some samples are held out of the steps: the state with the least divergence on them is kept, which
may be the start. They are calibration samples that blocks were tuned on, so the start has a small advantage there.
Scales of an FP8 cache and calibrated ranges of activations stay as the blocks' stage measured them.
Source: docs/algorithms.md, section 3.3 (as EfficientQAT's second phase, with KL instead of labels).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.blocks import BlockStream
from auto_round.config import RunConfig
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.formats.export import HEAD_BLOCK
from auto_round.memory import release_freed
from auto_round.outside import output_layers
from auto_round.plan import Plan
from auto_round.store import RunStore
from auto_round.tuning.divergence import QuantizedModel, rescaled
from auto_round.tuning.sampling import sample_order
from auto_round.tuning.scale_factors import why_not_tunable

logger = logging.getLogger(__name__)

HELD_OUT_PART = 8  # one sample of so many is held out
# Without --e2e_steps: up to this mean of bits. models/lm-30m, perplexity of dev.txt and WikiText-2 without and with 100
# steps: 2 bits 26.75 and 106.9, 26.52 and 103.8; 3 bits 23.90 and 87.9, 23.88 and 87.0; 4 bits none helped.
LARGEST_DEFAULT_BITS = 3
LEAST_DEFAULT_STEPS = 50
CHECKS = 8  # times that the held-out samples are looked at


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What the steps gave.

    Attributes:
        sigmas: logarithms of the kept factors.
        kept_step: 0 for the start.
        first, best: divergence on held-out samples at the start and at the kept step.
    """

    sigmas: dict[str, Tensor]
    kept_step: int
    first: float
    best: float


def steps_of(config: RunConfig, plan: Plan) -> int:
    """Returns how many steps a run takes: those asked for, else as many as pay at the plan's bits."""
    asked = config.end_to_end.e2e_steps
    if asked is not None:
        return asked
    sizes = [(math.prod(entry.layer.shape), entry.scheme.bits) for entry in plan.quantized().values()]
    if why_not(plan) or sum(size * (bits - LARGEST_DEFAULT_BITS) for size, bits in sizes) > 0:
        return 0
    return min(config.tune.iters, max(LEAST_DEFAULT_STEPS, config.tune.iters // 4))


def why_not(plan: Plan) -> str | None:
    """Returns why the stage cannot work for a plan, or None."""
    if plan.structure.head is None:
        return "it needs a model that predicts tokens, and this one has no output layer"
    reasons = {why_not_tunable(entry.scheme) for entry in plan.quantized().values()}
    if None not in reasons:
        return "it cannot tune any layer: " + ("; ".join(sorted(filter(None, reasons))) or "nothing is quantized")
    return None


def check(config: RunConfig, plan: Plan) -> None:
    """Raises UnsupportedError if the stage is asked for and cannot work for a plan."""
    reason = why_not(plan)
    if config.end_to_end.e2e_steps and reason:
        raise UnsupportedError(f"e2e_steps={config.end_to_end.e2e_steps}: {reason}. Leave out --e2e_steps")


def check_stream(stream: BlockStream, config: RunConfig) -> str | None:
    """Returns why model or samples do not allow the stage, or None.

    Raises:
        UnsupportedError, CalibrationError: they do not, and it was asked for.
    """
    reason = _why_not_followed(stream)
    if config.end_to_end.e2e_steps and reason:
        kind = UnsupportedError if stream.changes_between_blocks else CalibrationError
        raise kind(f"e2e_steps={config.end_to_end.e2e_steps}: {reason}")
    return reason


def _why_not_followed(stream: BlockStream) -> str | None:
    if stream.changes_between_blocks:
        return (
            f"{type(stream.source.model).__name__} changes hidden states between its blocks, which the steps cannot "
            "follow backwards. Leave out --e2e_steps"
        )
    if len(stream.data) < 2:
        return "it needs at least 2 calibration samples: one is held out. Raise --nsamples"
    return None


def drop_other(store: RunStore, config: RunConfig) -> None:
    """Drops the stage's result of an earlier run with other options; its blocks can be used all the same."""
    record = store.scales_record()
    if record and record["options"] != dataclasses.asdict(config.end_to_end):
        store.drop_scales()


def tune_scales(
    plan: Plan, store: RunStore, config: RunConfig, open_stream: Callable[[], BlockStream], *, steps: int, seed: int
) -> None:
    """Runs the stage on the finished blocks of a store, unless the store has its result already.

    The store's blocks have the new scales afterwards. Codes stay as they are.
    """
    record = store.scales_record()
    if record:
        logger.info("end to end: from the interrupted run, %s", _described(record["summary"]))
        return
    stream = open_stream()
    reason = check_stream(stream, config)
    if reason:
        logger.info("end to end: left out; %s", reason)
        return
    transposed = frozenset(entry.layer.parameter for entry in plan.entries if entry.layer.transposed)
    heads = [(name, store.load(HEAD_BLOCK).weights[name]) for name in output_layers(plan)]
    # An embedding that serves as output layer: what other scales do to the model's input is not seen here.
    fixed = frozenset(name for name, _ in heads if name != f"{plan.structure.head}.weight")
    started = time.monotonic()
    try:
        model = QuantizedModel(stream, store.load, heads[0] if heads else None, transposed, fixed)
        release_freed()
        outcome = run_steps(model, config, steps, torch.Generator().manual_seed(seed))
    except torch.OutOfMemoryError:
        if config.end_to_end.e2e_steps is not None or distributed.world_size() > 1:
            raise
        # The blocks are finished and good without it.
        logger.warning("end to end: left out, memory does not suffice. --low_gpu_mem_usage keeps codes in host memory")
        return
    if distributed.is_writer():
        changed = {
            name: rescaled(weight, outcome.sigmas[model.keys[name]].to(weight.scale.device))
            for name, weight in model.weights().items()
            if name in model.keys and outcome.kept_step
        }
        summary = {name: getattr(outcome, name) for name in ("kept_step", "first", "best")}
        store.save_scales(changed, dataclasses.asdict(config.end_to_end), **summary, seconds=time.monotonic() - started)
    distributed.barrier()
    logger.info("end to end: %s", _described(store.scales_record()["summary"]))


def _described(summary: dict[str, Any]) -> str:
    return (
        f"held-out KL {summary['first']:.4f} -> {summary['best']:.4f}, {summary['kept_step']} steps kept"
        if summary["kept_step"]
        else f"no step lowered the held-out KL of {summary['first']:.4f}; scales stay"
    )


def split_samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns samples for the steps and held-out ones, int64, at least one each for two samples and more."""
    order = torch.randperm(count, generator=generator)
    held_out = max(1, count // HELD_OUT_PART)
    return order[held_out:].sort().values, order[:held_out].sort().values


def run_steps(model: QuantizedModel, config: RunConfig, steps: int, generator: torch.Generator) -> Outcome:
    """Returns the factors that the steps gave, those of the best held-out check.

    Args:
        generator: on the CPU; chooses the held-out samples, then those of each step.
    """
    started = time.monotonic()
    training, held_out = split_samples(len(model.inputs), generator)
    sigmas = model.start()
    first = best = model.divergence(held_out, sigmas)
    kept, kept_step = {key: sigma.cpu() for key, sigma in sigmas.items()}, 0
    logger.info("end to end: held-out KL %.4f before %d steps on %d samples", first, steps, len(training))
    if not math.isfinite(first):
        logger.warning("end to end: the quantized model's predictions are not finite; scales stay")
        return Outcome(kept, 0, first, best)
    adam = torch.optim.Adam(list(sigmas.values()), lr=config.end_to_end.e2e_lr)
    chosen = _samples(len(training), config, generator)
    for step in range(1, steps + 1):
        for group in adam.param_groups:
            group["lr"] = config.end_to_end.e2e_lr * (1 - (step - 1) / steps)
        loss, gradients = model.gradients(training[next(chosen)], sigmas)
        for key, sigma in sigmas.items():
            sigma.grad = gradients[key]
        adam.step()
        if step % max(1, steps // CHECKS) and step < steps:
            continue
        now = model.divergence(held_out, sigmas)
        passed = time.monotonic() - started
        logger.info("end to end: step %d/%d, KL %.4f, held out %.4f, %.1f s", step, steps, float(loss), now, passed)
        if now < best:
            best, kept, kept_step = now, {key: sigma.cpu().clone() for key, sigma in sigmas.items()}, step
        elif not math.isfinite(now):
            logger.warning("end to end: stopped at step %d, predictions are not finite. Lower --e2e_lr", step)
            break
    return Outcome(kept, kept_step, first, best)


def _samples(count: int, config: RunConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the samples of each step; every one comes once before any comes again."""
    return sample_order(count, dataclasses.replace(config.tune, sampler="epoch"), generator)
