"""Repeats a step as a CUDA graph, or compiled, where that is possible, and as it is where it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

EAGER_STEPS = 2  # lazy initialisation of libraries must be over before a capture


def repeat_on_device(step: Callable[[Tensor], None], may_capture: bool) -> Callable[[Tensor], None]:
    """Returns a function that does what `step(samples)` does, from the third call on by replaying a graph.

    Args:
        step: reads `samples` and otherwise only tensors that stay where they are; changes tensors in place.
        may_capture: whether to try; a step that cannot be captured goes on eagerly.
    """
    return _CapturedStep(step) if may_capture else step


def compiled_or_eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a compiled function that goes on eagerly, for good, when compiling fails."""
    compiled = torch.compile(function)
    working = True

    def call(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal working
        if working:
            try:
                return compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise  # eager passes would take more
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
                logger.warning("torch.compile failed, going on without: %s", str(error).splitlines()[0])
                working = False
        return function(*args, **kwargs)

    return call


class _CapturedStep:
    def __init__(self, step: Callable[[Tensor], None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.samples: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls, self.failed = 0, False

    def __call__(self, samples: Tensor) -> None:
        if self.samples is None:
            self.samples = samples.cuda()
        elif samples.shape == self.samples.shape:
            self.samples.copy_(samples, non_blocking=True)
        else:
            self.step(samples)
            return
        if self.graph is not None:
            self.graph.replay()
        elif self.failed or self.calls < EAGER_STEPS:
            self._run_beside()
        else:
            self._capture()
        self.calls += 1

    def _run_beside(self) -> None:
        """Runs the step on the stream that the capture will use."""
        assert self.samples is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(self.samples)
        torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self) -> None:
        assert self.samples is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.step(self.samples)
        except RuntimeError as error:
            logger.debug("the step is not captured as a CUDA graph: %s", error)
            self.failed = True
            self._run_beside()
            return
        self.graph = graph
        graph.replay()
