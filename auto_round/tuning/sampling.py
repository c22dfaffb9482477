"""Which samples each step sees. Drawn on the CPU, so neither device nor number of ranks changes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from auto_round.config import TuneConfig


def sample_order(count: int, config: TuneConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields sample indices, (batch_size * gradient_accumulate_steps,) int64 or fewer if there are not so many.

    "rand" draws each step anew, "epoch" goes through a shuffled order before any sample comes again.
    """
    size = min(config.batch_size * config.gradient_accumulate_steps, count)
    while True:
        order = torch.randperm(count, generator=generator)
        if config.sampler == "rand":
            yield order[:size]
        else:
            yield from (part for part in order.split(size) if part.numel() == size)
