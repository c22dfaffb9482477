"""The error of a block against its targets and its gradients, over samples that go through it in micro-batches.

Everything is a sum over samples divided by the number of outputs that count, so it is the same, up to the order of
float32 sums, however many micro-batches or ranks share the samples.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round import distributed
from auto_round.tuning.base import TuningTask
from auto_round.tuning.feed import Feed, feed_of
from auto_round.tuning.input_mix import InputMix
from auto_round.tuning.squared_error import squared_error


class BlockError:
    """Squared error of a block's outputs.

    Args:
        task: the block, what it sees and what it should give.
        micro_batch: samples of one forward and backward pass.
        call: as in `Block.forward`, for passes with gradients.
        mixes: steps see some tokens as the original model gives them, where the two differ.
    """

    def __init__(
        self, task: TuningTask, micro_batch: int, call: Callable[..., Any] = functional_call, *, mixes: bool = False
    ) -> None:
        assert task.targets is not None
        self.task, self.micro_batch, self.call = task, micro_batch, call
        self.activations: tuple[Tensor, ...] = (task.inputs, task.targets)
        self.mix: InputMix | None = None
        self.step = torch.zeros((), dtype=torch.int64, device=task.block.device)
        if mixes and task.original_inputs is not None and task.original_inputs is not task.inputs:
            self.activations += (task.original_inputs,)
            samples, tokens = task.inputs.shape[:2]
            self.mix = InputMix(samples, tokens, task.generator(), task.block.device)
        self.feed = Feed(self.activations, task.block.device)

    @contextlib.contextmanager
    def fed_ahead(self, steps: Iterable[Tensor]) -> Iterator[None]:
        """Takes batches from host memory before they are needed, for steps on these samples in this order."""
        order = (batch for samples in steps for batch in self.batches(samples))
        self.feed = feed_of(self.activations, self.task.block.device, order)
        try:
            yield
        finally:
            self.feed.close()
            self.feed = Feed(self.activations, self.task.block.device)

    def elements(self, samples: Tensor) -> int:
        """Returns how many outputs of the block count for some samples: those at real tokens."""
        assert self.task.targets is not None
        if self.task.mask is None:
            tokens = samples.numel() * self.task.inputs.shape[1]
        else:
            tokens = max(int(self.task.mask[samples].sum()), 1)
        return tokens * self.task.targets.shape[-1]

    def batches(self, samples: Tensor) -> Sequence[Tensor]:
        """Returns the micro-batches that are this rank's share of some samples."""
        shares = samples.chunk(distributed.world_size())
        return shares[distributed.rank()].split(self.micro_batch) if distributed.rank() < len(shares) else ()

    def factor(self, elements: int) -> float:
        """Returns what squared errors are multiplied with before the backward pass: 1 / elements, their mean.

        In float16 that would vanish; there gradients of outputs stay between 2**-24 and 2**15 for differences between
        2**-19 and 2**20. Only signs and ratios of gradients count.
        """
        return 2.0**-6 if self.task.block.dtype == torch.float16 else 1 / elements

    def squared(
        self,
        samples: Tensor,
        replaced: Mapping[str, Tensor],
        call: Callable[..., Any] = functional_call,
        *,
        mixed: bool = False,
    ) -> Tensor:
        """Returns () float32, the sum of squared errors over a micro-batch; `mixed` as step number `step` sees it."""
        task = self.task
        inputs, targets, *original = self.feed.take(samples)
        if mixed and self.mix is not None:
            inputs = self.mix(inputs, original[0], samples, self.step)
        output = task.block.forward(inputs, samples, replaced, call=call)
        weight = None if task.mask is None else task.mask[samples].to(task.block.device)[..., None]
        return squared_error(output, targets, weight)

    @torch.no_grad()
    def mean(self, samples: Tensor, replaced: Mapping[str, Tensor]) -> float:
        """Returns the mean squared error over some samples; every rank works on all of them."""
        errors = [self.squared(batch, replaced) for batch in samples.split(self.micro_batch)]
        return float(sum(errors)) / self.elements(samples)

    def gradients(self, samples: Tensor, replaced: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns mean squared error over a step's samples and its gradients, summed over micro-batches and ranks.

        Every rank takes its share of the samples; the sum is the same whatever the number of batches and ranks.
        """
        names = list(replaced)
        total = torch.zeros((), device=self.task.block.device)
        gradients: dict[str, Tensor] = {}
        elements = self.elements(samples)
        factor = self.factor(elements)
        for batch in self.batches(samples):
            error = self.squared(batch, replaced, self.call, mixed=True)
            found = torch.autograd.grad(error * factor, [replaced[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    scaled = gradient.float() / (elements * factor)
                    gradients[name] = gradients[name] + scaled if name in gradients else scaled
            total += error.detach() / elements
        if distributed.world_size() > 1:
            for name in names:
                gradients.setdefault(name, torch.zeros_like(replaced[name], dtype=torch.float32).detach())
                distributed.sum_over_ranks(gradients[name])
            distributed.sum_over_ranks(total)
        return total, gradients

    def give_gradients(
        self,
        samples: Tensor,
        replaced: Mapping[str, Tensor],
        note: Callable[[Tensor], None],
        complete: Callable[[str, Tensor, float], None],
    ) -> None:
        """Finds the same on one rank, but gives each gradient away, and frees it, inside the last backward pass.

        So one batch has no more than one weight's gradient at a time, a quarter of a step's memory less for large
        blocks. Several have float32 sums of all weights between their passes.

        Args:
            note: takes the mean squared error, before any gradient is given.
            complete: takes a name, a gradient, and what it has to be multiplied with to be that of the mean.
        """
        elements, batches = self.elements(samples), self.batches(samples)
        factor = self.factor(elements)
        unit = 1 / (elements * factor)
        sums = GradientSums(replaced, lambda name, gradient: complete(name, gradient, unit))
        total = torch.zeros((), device=self.task.block.device)
        for number, batch in enumerate(batches, start=1):
            error = self.squared(batch, replaced, self.call, mixed=True)
            total += error.detach() / elements
            if number == len(batches):
                note(total)
                sums.are_last = True
            (error * factor).backward()
        sums.give_rest()


class GradientSums:
    """Adds gradients as backward passes give them, and gives each sum away as soon as it is complete.

    Args:
        tensors: leaves by name; none of them keeps a gradient.
        complete: takes a name and the sum, in float32 if several gradients were added.
    """

    def __init__(self, tensors: Mapping[str, Tensor], complete: Callable[[str, Tensor], None]) -> None:
        self.complete = complete
        self.are_last = False
        self._sums: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            tensor.register_post_accumulate_grad_hook(functools.partial(self._take, name))

    def give_rest(self) -> None:
        """Gives the sums of tensors that the last pass did not reach, as experts that no token was routed to."""
        while self._sums:
            self.complete(*self._sums.popitem())

    def _take(self, name: str, tensor: Tensor) -> None:
        gradient = tensor.grad
        assert gradient is not None
        tensor.grad = None
        with torch.no_grad():
            if name in self._sums:
                gradient = self._sums.pop(name).add_(gradient)
            if self.are_last:
                self.complete(name, gradient)
            else:
                self._sums[name] = gradient.float()
