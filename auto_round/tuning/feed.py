"""Batches of activations for the steps of a block.

Activations on the compute device are indexed there. Those in host memory are copied one batch ahead, on a stream of
their own, while the device works on the batch before: two sets of buffers, one in use, one being filled. Which samples
come is known beforehand, because they are drawn on the CPU.

Shape letters: N samples of all, B samples of a batch, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """What copies run on, beside the work of the compute device."""

    def begin(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context for copies that begin when all work given to the device so far is done."""
        ...

    def finish(self) -> None:
        """Makes work that is given to the device from now on wait for the copies."""
        ...


class SideStream:
    """A second CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self) -> contextlib.AbstractContextManager[object]:
        """As in `Lane`."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def finish(self) -> None:
        """As in `Lane`."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class InOrder:
    """No second stream: copies run when they are given, as everything does there."""

    def begin(self) -> contextlib.AbstractContextManager[object]:
        """As in `Lane`."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """As in `Lane`."""


class Feed:
    """Gives batches of some activations on the compute device.

    Args:
        activations: (N, T, H) each, on one device.
        device: the compute device.
    """

    def __init__(self, activations: Sequence[Tensor], device: torch.device) -> None:
        self.activations, self.device = tuple(activations), device

    def take(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Returns (B, T, H) of each of the activations, for samples (B,) int64."""
        where = samples.to(self.activations[0].device)
        return tuple(tensor[where].to(self.device) for tensor in self.activations)

    def close(self) -> None:
        """Lets go of what is being copied."""


class FeedAhead(Feed):
    """The same from host memory, for batches whose order is known: the next one is copied while one is worked on.

    A batch is valid until the next one is taken. A batch out of order is copied by itself and changes nothing.

    Args:
        order: the samples of each batch, in order.
        lane: what copies run on.
    """

    def __init__(
        self, activations: Sequence[Tensor], device: torch.device, order: Iterable[Tensor], lane: Lane | None = None
    ) -> None:
        super().__init__(activations, device)
        self._order = iter(order)
        self._lane = lane if lane is not None else _lane_of(device)
        self._buffers: list[tuple[Tensor, ...]] = [(), ()]
        self._turn = 0
        self._coming: Tensor | None = None
        self._send_next()

    def take(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Returns (B, T, H) of each of the activations; the copy of the batch behind it begins."""
        if self._coming is None or not torch.equal(self._coming, samples):
            return super().take(samples)
        self._lane.finish()
        batch = tuple(buffer[: len(samples)] for buffer in self._buffers[self._turn])
        self._turn = 1 - self._turn
        self._send_next()
        return batch

    def close(self) -> None:
        """Lets go of the buffers, which must not be used for anything else while a copy writes to them."""
        self._lane.finish()
        self._buffers, self._coming, self._order = [(), ()], None, iter(())

    def _send_next(self) -> None:
        self._coming = next(self._order, None)
        if self._coming is None:
            return
        buffers = self._buffers[self._turn]
        if not buffers or len(buffers[0]) < len(self._coming):
            shape = (len(self._coming), *self.activations[0].shape[1:])
            buffers = tuple(tensor.new_empty(shape, device=self.device) for tensor in self.activations)
            self._buffers[self._turn] = buffers
        with self._lane.begin():
            # Sample by sample, straight from where it lies: a batch gathered on the host first would be copied twice.
            for row, sample in enumerate(self._coming.tolist()):
                for buffer, tensor in zip(buffers, self.activations, strict=True):
                    buffer[row].copy_(tensor[sample], non_blocking=True)


def _lane_of(device: torch.device) -> Lane:
    return SideStream(device) if device.type == "cuda" else InOrder()


def feed_of(activations: Sequence[Tensor], device: torch.device, order: Iterable[Tensor]) -> Feed:
    """Returns what gives batches in an order known beforehand."""
    if activations[0].device.type == device.type:
        return Feed(activations, device)
    return FeedAhead(activations, device, order)
