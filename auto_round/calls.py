"""How a model calls its blocks: stand-ins that take their places, and the arguments that they were called with.

A block's arguments besides the hidden states (masks, rotary tables, states of a vision tower) are recorded once for all
calibration samples. Which dimension of a tensor counts samples is found by calling the model with one sample and with
two; it is not the first one everywhere (rotary tables of several axes).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class SampleAxis:
    """Where a tensor counts samples: a dimension, and how many rows of it each sample has."""

    dimension: int = 0
    rows: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """Returns a tensor with samples, and behind them the rows of each if they are several, in front."""
        front = tensor.movedim(self.dimension, 0)
        return front if self.rows == 1 else front.unflatten(0, (-1, self.rows))

    def join(self, front: Tensor) -> Tensor:
        """Returns what `split` was given."""
        return (front if self.rows == 1 else front.flatten(0, 1)).movedim(0, self.dimension)


FIRST = SampleAxis()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlockCalls:
    """The arguments, besides the hidden states, that the model passes to one block.

    Attributes:
        shared: nested structure of arguments with `None` where a tensor differs from sample to sample.
        per_sample: flat position -> (N, ...) tensor for those, in the order of the flattened structure; (N, R, ...)
            where an argument has several rows for each sample, as the tiles of a picture are.
        spec: structure of (args, kwargs).
        axes: flat position -> where the argument counts samples; where nothing is said, in its first dimension.
        runs: the model calls the block for these samples; it leaves out cross-attention where there is no picture.
    """

    shared: tuple[Any, ...]
    per_sample: Mapping[int, Tensor]
    spec: Any
    axes: Mapping[int, SampleAxis] = dataclasses.field(default_factory=dict)
    runs: bool = True

    def for_samples(self, samples: Tensor, device: torch.device, dtype: torch.dtype) -> Arguments:
        """Returns positional and keyword arguments for some samples, floating tensors in `dtype`."""
        leaves = [
            self.axes.get(i, FIRST).join(self.per_sample[i][samples.to(self.per_sample[i].device)])
            if i in self.per_sample
            else leaf
            for i, leaf in enumerate(self.shared)
        ]
        moved = [moved_to(leaf, device, dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return torch.utils._pytree.tree_unflatten(moved, self.spec)


NOT_CALLED = BlockCalls((), {}, None, runs=False)


class Trace:
    """What stand-ins of one model tell each other: where hidden states are changed between two blocks.

    Attributes:
        changed: names of blocks that get something else than the block before them gave, e.g. with vision features
            added.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self._last: tuple[Tensor, int] | None = None

    def begin(self) -> None:
        """Marks the beginning of a forward pass."""
        self._last = None

    def enter(self, name: str, hidden: Tensor) -> bool:
        """Notes what a block gets and passes on; returns whether it is the first of the pass."""
        is_first = self._last is None
        if self._last is not None:
            before, version = self._last
            if hidden.ndim < before.ndim:
                raise IndexedOutputError
            if hidden is not before or hidden._version != version:
                self.changed.add(name)
        self._last = (hidden, hidden._version)
        return is_first


class IndexedOutputError(Exception):
    """The model takes the first element of what a block returns, so that a block has to return a tuple."""


class Recorder(nn.Module):
    """Stands in for a block: remembers how it is called, passes hidden states through.

    The first one also keeps the hidden states.

    Args:
        as_tuple: pass them on as the first element of a tuple.
    """

    def __init__(self, name: str, trace: Trace, *, as_tuple: bool) -> None:
        super().__init__()
        self.name, self.trace, self.as_tuple = name, trace, as_tuple
        self.hidden: list[Tensor] = []
        self.calls: list[tuple[int, tuple, dict]] = []

    def forward(self, hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        if self.trace.enter(self.name, hidden):
            self.hidden.append(hidden)
        self.calls.append((hidden.shape[0], args, kwargs))
        return (hidden,) if self.as_tuple else hidden


class ReachedError(Exception):
    """What was wanted of a forward pass is there; the rest of it is not needed."""


class Replay(nn.Module):
    """Stands in for a block or the output layer: passes its input through, or gives `output` if that is set.

    Args:
        collected: list that inputs are kept in.
        stops: end the forward pass here.
    """

    def __init__(self, collected: list[Tensor] | None = None, *, as_tuple: bool = False, stops: bool = False) -> None:
        super().__init__()
        self.collected, self.as_tuple, self.stops = collected, as_tuple, stops
        self.output: Tensor | None = None

    def forward(self, hidden: Tensor | None = None, *_args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if hidden is None else hidden
        if self.collected is not None:
            self.collected.append(hidden)
        if self.stops:
            raise ReachedError
        given = hidden if self.output is None else self.output
        return (given,) if self.as_tuple else given


class GivenWeight(nn.Module):
    """Stands in for the output layer, with a weight that gradients reach."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.given = (weight, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, *self.given)


@contextlib.contextmanager
def replaced_modules(model: nn.Module, names: Sequence[str], make: Callable[[str], nn.Module]) -> Iterator[None]:
    """Puts stand-ins in the place of modules and takes them out again, whatever happens."""
    saved = []
    try:
        for name in names:
            parent = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            original = parent._modules[leaf]
            assert original is not None
            stand_in = make(name)
            for attribute, value in vars(original).items():  # models read attributes such as attention_type of a layer
                if not attribute.startswith("_") and attribute not in vars(stand_in):
                    stand_in.__dict__[attribute] = value
            saved.append((parent, leaf, original))
            parent._modules[leaf] = stand_in
        yield
    finally:
        for parent, leaf, original in reversed(saved):
            parent._modules[leaf] = original


def sample_axes(one: Recorder, two: Recorder) -> list[SampleAxis | None]:
    """Returns, for each argument of a block, where it counts samples; None where it does not.

    Args:
        one, two: recorders of a pass with one sample, and of a pass with two.
    """
    flat = [torch.utils._pytree.tree_flatten(recorder.calls[0][1:])[0] for recorder in (one, two)]
    axes: list[SampleAxis | None] = []
    for first, second in zip(*flat, strict=True):
        sizes = zip(first.shape, second.shape, strict=True) if isinstance(first, Tensor) else ()
        grown = [SampleAxis(axis, after - before) for axis, (before, after) in enumerate(sizes) if after != before]
        axes.append(grown[0] if grown else None)
    return axes


def merge_calls(
    recorder: Recorder,
    axes: Sequence[SampleAxis | None],
    extra: int,
    merged: dict[tuple[int, ...], Any],
    *,
    joins_equal: bool,
) -> BlockCalls:
    """Joins the calls of all batches.

    Args:
        axes: of `sample_axes`.
        extra: rows at the end of each call that are no samples.
        merged: what was joined for earlier blocks, by identity; blocks mostly get the very same tensors.
        joins_equal: keep a tensor once if it is the same for every sample.
    Raises:
        UnsupportedError: arguments of samples that cannot be put side by side.
    """
    flat = [torch.utils._pytree.tree_flatten((args, kwargs)) for _, args, kwargs in recorder.calls]
    leaves_by_call, spec = [leaves for leaves, _ in flat], flat[0][1]
    shared, per_sample = list(leaves_by_call[0]), {}
    for position, axis in enumerate(axes):
        if axis is None:
            continue
        values = [leaves[position] for leaves in leaves_by_call]
        identity = tuple(id(value) for value in values)
        if identity not in merged:
            sizes = [size - extra for size, *_ in recorder.calls]
            rows = [axis.split(value)[:size] for value, size in zip(values, sizes, strict=True)]
            merged[identity] = _joined(rows, sizes, recorder.name, joins_equal and axis.rows == 1)
        once, varying = merged[identity]
        shared[position] = None if once is None else axis.join(once)
        if varying is not None:
            per_sample[position] = varying
    return BlockCalls(tuple(shared), per_sample, spec, {i: axes[i] or FIRST for i in per_sample})


def _joined(rows: list[Tensor], sizes: list[int], name: str, joins_equal: bool) -> tuple[Tensor | None, Tensor | None]:
    """Returns one row that stands for all, or all rows."""
    if [len(row) for row in rows] != sizes or len({row.shape[1:] for row in rows}) > 1:
        shapes = sorted({tuple(row.shape[1:]) for row in rows})[:3]
        raise UnsupportedError(
            f"{name}: calibration samples give it arguments of different sizes ({shapes}), which cannot be put side by "
            "side. Give samples with equally many pictures of one size"
        )
    if joins_equal and all(torch.equal(row, rows[0][:1].expand_as(row)) for row in rows):
        return rows[0][:1], None
    return None, torch.cat([row.cpu() for row in rows])


def moved_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns a tensor on a device, in `dtype` if it holds floating-point numbers."""
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
