"""Keeps the tuning of blocks within a budget of GPU memory: chooses for each block, and says what it chose and why.

The budget is what the user names, else what is free on the GPU. Without either nothing is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import torch

from auto_round import distributed
from auto_round.block import Block
from auto_round.blocks import BlockStream
from auto_round.config import RunConfig
from auto_round.errors import ConfigError
from auto_round.option_values import parse_size
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.activations import input_quantizers, with_input_quantizers
from auto_round.tuning.block_bytes import (
    RESERVE,
    BlockBytes,
    Choice,
    choices,
    converted_bytes,
    first_that_fits,
    measured_passes,
    weight_bytes,
)

logger = logging.getLogger(__name__)


class MemoryBudget:
    """Chooses how each block is tuned.

    Args:
        config: has the budget, or None for what is free on the GPU.
        device: the compute device.
        chains: activations of all samples that are kept at a time: two, three where original inputs are needed.
    """

    def __init__(self, config: RunConfig, device: torch.device, chains: int) -> None:
        self.config, self.device, self.chains = config, device, chains
        self.named = None if config.max_gpu_memory is None else parse_size(config.max_gpu_memory)
        may_offload = device.type != "cpu"
        self.choices = choices(
            config.tune.batch_size,
            may_offload=may_offload,
            on_host=config.low_gpu_mem_usage and may_offload,
            may_recompute=config.tune.iters > 0,
        )
        self._least = 0  # index of the first choice that is still open
        self._told: Choice | None = None if self.named is not None else self.choices[0]
        self._passes: dict[Hashable, tuple[int, int, int]] = {}

    def total(self) -> int | None:
        """Returns the bytes that the process may hold on the device, None where that is not known."""
        if self.named is not None or self.device.type != "cuda":
            return self.named
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def starts_on_host(self, chain_bytes: int, other_bytes: int = 0) -> bool:
        """Whether activations are kept in host memory from the start, before it is known what blocks take.

        While they are first recorded they are there twice; later there are tensors of about their size beside them.

        Args:
            other_bytes: what is kept in the same place.
        """
        total = self.total()
        return self.choices[0].on_host or (
            self.device.type != "cpu" and total is not None and 2 * self.chains * chain_bytes + other_bytes > total
        )

    def choose(self, stream: BlockStream, block: Block, schemes: Mapping[str, QuantizationScheme]) -> Choice:
        """Returns the cheapest choice that fits; all ranks get the same.

        Raises:
            ConfigError: a budget was named and not even the last choice fits; the message says what would.
        """
        total = self.total()
        if total is None:
            return self.choices[0]
        size = self.count(stream, block, schemes)
        index = first_that_fits(self.choices, size, int(total * (1 - RESERVE)))
        if index is None and self.named is not None:
            raise self._error(total, size, block.name)
        index = len(self.choices) - 1 if index is None else index
        index = distributed.largest(max(index, self._least))
        choice = self.choices[index]
        if choice.on_host:
            # Activations stay there: to move them back and forth between blocks would cost more than it saves.
            self._least = max(self._least, next(i for i, other in enumerate(self.choices) if other.on_host))
        self._tell(choice, total, size, block.name)
        return choice

    def smaller(self, choice: Choice) -> Choice | None:
        """Returns the next choice, for all blocks from now on, after `choice` ran out of memory; None after the last.

        With several ranks there is none: they would not agree.
        """
        index = self.choices.index(choice) + 1
        if index == len(self.choices) or distributed.world_size() > 1:
            return None
        self._least = index
        return self.choices[index]

    def count(self, stream: BlockStream, block: Block, schemes: Mapping[str, QuantizationScheme]) -> BlockBytes:
        """Returns what a block takes that is on the device already; blocks of one kind are measured once."""
        tune = self.config.tune
        shapes = tuple(tuple(tensor.shape) for tensor in block.tensors.values())
        kind = (tuple(type(module) for module in block.modules), shapes, tuple(sorted(map(str, schemes.values()))))
        if kind not in self._passes:
            peaks = dict.fromkeys(schemes, torch.ones((), device=self.device))
            quantized = with_input_quantizers(block, input_quantizers(schemes, peaks))
            self._passes[kind] = measured_passes(quantized, stream.quantized[:1], schemes, tune)
        forward, backward, recomputed = self._passes[kind]
        chain = stream.quantized.nbytes
        return BlockBytes(
            held=self._held(stream, block),
            chains=self.chains * chain,
            sample=chain // len(stream.quantized),
            converted=converted_bytes(block),
            forward=forward,
            backward=backward,
            recomputed=recomputed,
            step_samples=min(tune.batch_size * tune.gradient_accumulate_steps, len(stream.quantized)),
            **weight_bytes(block, schemes, tune),
        )

    def _held(self, stream: BlockStream, block: Block) -> int:
        """Returns bytes on the device besides the chains."""
        if self.device.type != "cuda":
            return sum(tensor.nbytes for tensor in block.tensors.values())
        chains = {chain.data_ptr(): chain.nbytes for chain in (stream.original, stream.quantized) if chain is not None}
        on_device = stream.storage.type == self.device.type
        return torch.cuda.memory_allocated(self.device) - (sum(chains.values()) if on_device else 0)

    def _error(self, total: int, size: BlockBytes, name: str) -> ConfigError:
        least = min(self.choices, key=size.needed)
        smallest = -(-int(size.needed(least) / (1 - RESERVE)) // 2**20)
        return ConfigError(
            f"max_gpu_memory={self.config.max_gpu_memory} ({total / 2**30:.2f} GiB) is too little for {name}: with "
            f"{least.describe()} it takes {smallest / 2**10:.2f} GiB. Give --max_gpu_memory {smallest}MiB or more, or "
            "a smaller --seqlen or --nblocks"
        )

    def _tell(self, choice: Choice, total: int, size: BlockBytes, name: str) -> None:
        if choice == self._told:
            return
        first = self.choices[0]
        why = "" if choice == first else f"; {size.needed(first) / 2**30:.2f} GiB with {first.describe()}"
        logger.info(
            "%s: memory budget %.2f GiB: %s (%.2f GiB needed%s)",
            name, total / 2**30, choice.describe(), size.needed(choice) / 2**30, why,
        )  # fmt: skip
        self._told = choice
