"""Rounds a folder of weights tensor by tensor, file by file, without the model that they belong to.

Tensors are read, rounded and packed by several threads and written in the order in which they lie on disk, so that
memory holds a few tensors whatever the size of a file. The bytes are those of the normal path (`--iters 0
--disable_opt_rtn`): both round with `tuning.round_plain` and write with `formats.export.OpenExport`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from auto_round.config import RunConfig
from auto_round.data_types import DATA_TYPES
from auto_round.device import compute_device
from auto_round.formats import FormatTarget
from auto_round.formats.export import HEAD_BLOCK, OpenExport
from auto_round.formats.verify import verify
from auto_round.memory import release_freed
from auto_round.models.by_names import UNKNOWN_EXPERTS
from auto_round.plan import Plan
from auto_round.session import Session
from auto_round.sources.named import NamedSource
from auto_round.tensors import BlockResult, QuantizedTensor
from auto_round.tuning import round_plain, round_searched
from auto_round.tuning.base import join_peaks

logger = logging.getLogger(__name__)

GPU_THREADS = 2  # one reads while the other waits for the device

Item, Made = TypeVar("Item"), TypeVar("Made")


class Rounding(Mapping[str, QuantizedTensor]):
    """The quantized weights of a plan by parameter name, each rounded when it is asked for.

    Without calibration all input channels count alike where scales are searched.
    """

    def __init__(self, plan: Plan, source: NamedSource, config: RunConfig) -> None:
        self.entries, self.source = plan.quantized(), source
        self.device = compute_device(config.device)
        self.searches = not config.tune.disable_opt_rtn
        self.peaks = self._tensor_peaks()

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self.rounded(name, self.source.tensors(self.entries[name].layer.name)[name])

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @torch.no_grad()
    def rounded(self, name: str, stored: Tensor) -> QuantizedTensor:
        """Returns a weight rounded on the compute device, given what is stored under its name."""
        entry, weight = self.entries[name], stored.to(self.device)
        weight = weight.t() if entry.layer.transposed else weight
        if self.searches:
            return round_searched(weight.float(), entry.scheme, None, self.peaks.get(name))
        return round_plain(weight, entry.scheme, self.peaks.get(name))

    def _tensor_peaks(self) -> dict[str, Tensor]:
        """Returns the largest magnitudes that weights in a block share with those that engines join them with."""
        inside = {name: entry for name, entry in self.entries.items() if entry.layer.block is not None}
        if not any(DATA_TYPES[entry.scheme.data_type].has_tensor_scale for entry in inside.values()):
            return {}
        return join_peaks({name: self.source.read(name).abs().amax().float() for name in inside})


class RoundedAgain:
    """What the check of a written checkpoint asks of a store: weights are rounded anew when it looks at them."""

    def __init__(self, plan: Plan, rounding: Rounding) -> None:
        self.plan, self.rounding = plan, rounding

    def finished(self) -> list[str]:
        """Returns the names that results go by."""
        return [group[0] for group in self.plan.groups] + [HEAD_BLOCK] * bool(self.plan.outside())

    def load(self, block: str) -> BlockResult:  # noqa: ARG002
        """Returns all weights; each is rounded when it is taken."""
        return BlockResult(self.rounding)

    def plain(self, block: str) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns nothing: only quantized weights change."""
        return {}

    def cache_scales(self, block: str) -> dict[str, Tensor]:  # noqa: ARG002
        """Returns nothing: scales of a cache are calibrated."""
        return {}


def round_folder(session: Session, wanted: Sequence[FormatTarget]) -> float:
    """Writes every format from one pass over the weights, checks what was written, and returns the seconds of the pass.

    Raises:
        VerificationError: what was written is not what the source rounds to.
    """
    config, plan, source = session.config, session.plan, session.source
    assert isinstance(source, NamedSource), source
    _report(plan)
    started = time.monotonic()
    rounding = Rounding(plan, source, config)
    exports = [OpenExport(target.exporter, target.folder, plan, source, config) for target in wanted]
    with _threads(rounding.device, parallel=source.is_parallel) as pool:
        _write_weights(pool, source, rounding, exports)
        for export in exports:
            export.close(session.tokenizer)
            logger.info("wrote %s to %s", export.exporter.name, export.folder)
        seconds = time.monotonic() - started
        for target in wanted if config.verify else ():
            store = RoundedAgain(plan, rounding)
            verify(target.exporter, target.folder, plan=plan, source=source, store=store, config=config)
    return seconds


def _write_weights(
    pool: ThreadPoolExecutor, source: NamedSource, rounding: Rounding, exports: Sequence[OpenExport]
) -> None:
    def made_of(stored_key: str) -> list[dict[str, Tensor]]:
        return _tensors_of(stored_key, source, rounding, exports)

    files = source.files()
    for number, (file, keys) in enumerate(files.items(), 1):
        begun = time.monotonic()
        for made in in_order(pool, made_of, keys):
            for export, tensors in zip(exports, made, strict=True):
                export.write(tensors)
        release_freed()
        logger.info("file %d/%d %s, %.1f s", number, len(files), file, time.monotonic() - begun)
    for export in exports:
        for name in export.unstored():
            export.write(export.tensors_of(name, BlockResult({name: rounding[name]})))


def _tensors_of(
    stored_key: str, source: NamedSource, rounding: Rounding, exports: Sequence[OpenExport]
) -> list[dict[str, Tensor]]:
    """Returns, for each format, what is written in place of a stored tensor."""
    made: list[dict[str, Tensor]] = [{} for _ in exports]
    for key, tensor in source.pieces(stored_key, rounding):
        result = BlockResult({key: rounding.rounded(key, tensor)} if key in rounding else {})
        for export, tensors in zip(exports, made, strict=True):
            written = export.tensors_of(key, result, tensor)
            tensors.update({name: value.cpu() for name, value in written.items()})
    return made


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Made], items: Iterable[Item], *, ahead: int = 2
) -> Iterator[Made]:
    """Yields what a function makes of each item, in their order, while threads work on a few items ahead.

    Args:
        ahead: how many more results than there are threads may wait to be taken; this bounds memory.
    """
    waiting: deque[Future[Made]] = deque()
    for item in items:
        if len(waiting) >= pool._max_workers + ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _threads(device: torch.device, *, parallel: bool) -> Iterator[ThreadPoolExecutor]:
    """Gives threads that work on a tensor each. On a CPU torch uses one thread in each of them meanwhile.

    Two threads with a tensor each take less time than one tensor at a time on two cores: most steps are short.
    """
    count = GPU_THREADS if device.type != "cpu" else _usable_cores()
    before = torch.get_num_threads()
    alone: dict[str, Any] = {}
    if parallel and device.type == "cpu":
        torch.set_num_threads(1)
        alone = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pool = ThreadPoolExecutor(count if parallel else 1, thread_name_prefix="round", **alone)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(plan: Plan) -> None:
    """Logs what was decided by names alone."""
    for adjustment in plan.adjustments:
        logger.info("changed: %s", adjustment)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    structure = plan.structure
    logger.info(
        "by the names of the tensors: %d of %d linear layers in %d blocks of %s are quantized; output layer %s",
        len(plan.quantized()), len(plan.entries), len(structure.blocks), ", ".join(structure.block_lists),
        structure.head,
    )  # fmt: skip
    fused = [name for name, reason in structure.other_weights.items() if reason == UNKNOWN_EXPERTS]
    if fused:
        logger.warning(
            "%d tensors hold experts in a way that names do not tell; they stay in 16 bits, e.g. %s",
            len(fused),
            fused[0],
        )
