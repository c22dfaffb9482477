"""How much memory of the compute device tuning a block takes, and the ways to take less, the cheapest first.

What a block needs is counted from its weights, the calibration samples, and one sample that goes through it once
forwards and once with a backward pass. The ways: everything on the device; activations in host memory, copied one batch
ahead; smaller micro-batches, whose gradients are summed before a step; one sample at a time whose attention and MLP run
again for the backward pass. None of them changes what is computed, beyond the order of sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.block import Block
from auto_round.config import TuneConfig
from auto_round.device import runs_triton
from auto_round.memory import LiveBytes
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.fused_step import FUSED_WEIGHTS
from auto_round.tuning.squared_error import squared_error
from auto_round.tuning.statistics import channel_importance, group_products, output_sensitivity
from auto_round.tuning.tuned_weight import PIECE_ELEMENTS

# Part of the budget that is left alone: workspaces of kernels, which no count of tensors sees.
RESERVE = 1 / 16
# Float32 tensors that are there at a time: as large as a piece of a weight in a search or a step without kernel, beside
# one of the whole weight; as large as the weight in its encoding. tests/tuning/test_block_bytes.py counts them.
PIECE_COPIES = 8
ENCODING_COPIES = 5
# Range and clip factors of a group, float32: two each at most.
GROUP_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """How a block is tuned.

    Attributes:
        on_host: activations lie in host memory.
        micro_batch: samples of one forward and backward pass.
        recomputes: as in `Block`.
    """

    on_host: bool
    micro_batch: int
    recomputes: bool = False

    def describe(self) -> str:
        """Returns the choice in words."""
        where = "activations in host memory" if self.on_host else "activations on the compute device"
        size = "1 sample" if self.micro_batch == 1 else f"{self.micro_batch} samples"
        return f"{where}, micro-batches of {size}" + (", attention and MLP recomputed" if self.recomputes else "")


@dataclasses.dataclass(frozen=True, slots=True)
class BlockBytes:
    """What tuning one block takes on the compute device, in bytes.

    Attributes:
        held: what is there anyway: the block's stored weights, what lies outside the blocks, other users.
        chains: activations of all samples, all chains that are kept.
        sample: hidden states of one sample.
        tuned: parameters of all quantized weights, and what they stand for.
        gradients: of all weights, as the backward pass gives them.
        sums: float32 sums of gradients, when several micro-batches make a step.
        converted: the block's weights in the precision that it runs in, for a pass, where they are stored in another.
        forward: a forward pass of one sample and its statistics, without those.
        backward: a forward and backward pass of one sample, without gradients of weights.
        recomputed: the same where attention and MLP run again.
        pieces: temporary tensors of searches and encodings.
        moving: temporary tensors of steps.
        step_samples: samples that make one step.
    """

    held: int
    chains: int
    sample: int
    tuned: int
    gradients: int
    sums: int
    converted: int
    forward: int
    backward: int
    recomputed: int
    pieces: int
    moving: int
    step_samples: int

    def needed(self, choice: Choice) -> int:
        """Returns the most that is there at a time: of a pass over the samples, the search for scales, or a step."""
        batch = choice.micro_batch
        # Inputs and targets of a batch; those that are copied ahead have a second pair.
        batches = batch * self.sample * (4 if choice.on_host else 2)
        one_pass = self.recomputed if choice.recomputes else self.backward
        step = self.tuned + batches + batch * one_pass + self.gradients + self.moving
        if batch < self.step_samples:
            step += self.sums
        passes = self.tuned + self.converted + batch * (self.forward + self.sample)
        most = max(step if one_pass else 0, passes, self.tuned + self.pieces)
        return self.held + (0 if choice.on_host else self.chains) + most


def choices(batch_size: int, *, may_offload: bool, on_host: bool, may_recompute: bool) -> list[Choice]:
    """Returns what can be chosen, the cheapest first.

    Args:
        may_offload: the compute device has memory of its own.
        on_host: activations lie in host memory in any case.
    """
    micro_batches = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    offloaded = on_host or may_offload
    found = [] if on_host or not may_offload else [Choice(on_host=False, micro_batch=batch_size)]
    found += [Choice(on_host=offloaded, micro_batch=size) for size in micro_batches]
    return [*found, Choice(on_host=offloaded, micro_batch=1, recomputes=True)] if may_recompute else found


def first_that_fits(found: Sequence[Choice], size: BlockBytes, budget: int) -> int | None:
    """Returns the index of the cheapest choice that needs no more than `budget` bytes, None if none does."""
    return next((index for index, choice in enumerate(found) if size.needed(choice) <= budget), None)


def measured_passes(
    block: Block,
    sample_1TH: Tensor,
    schemes: Mapping[str, QuantizationScheme],
    config: TuneConfig,
) -> tuple[int, int, int]:
    """Returns the bytes of `forward`, `backward` and `recomputed` of `BlockBytes`, 0 for passes that are not made.

    Intermediate tensors grow with the samples, so a batch takes as many times what one sample takes.
    """
    if not block.runs:
        return 0, 0, 0
    one = [slice(0, 1)]
    with LiveBytes() as live:
        if config.iters > 0:
            channel_importance(block, sample_1TH, one, list(schemes))
        else:
            group_products(block, sample_1TH, one, schemes)
    forward = live.peak
    steps = config.iters > 0 and bool(schemes)
    if steps and config.uses_curvature:
        with LiveBytes() as live:
            output_sensitivity(block, sample_1TH, one, list(schemes), torch.Generator().manual_seed(0))
        forward = max(forward, live.peak)
    forward = max(forward - converted_bytes(block), 0)
    if not steps:
        return forward, 0, 0
    passes = [_backward_bytes(dataclasses.replace(block, recomputes=again), sample_1TH, schemes) for again in (0, 1)]
    return forward, *passes


def converted_bytes(block: Block) -> int:
    """Returns `converted` of `BlockBytes`."""
    others = [t for t in block.tensors.values() if t.is_floating_point() and t.dtype != block.dtype]
    return sum(tensor.numel() for tensor in others) * block.dtype.itemsize


def _backward_bytes(block: Block, sample_1TH: Tensor, schemes: Mapping[str, QuantizationScheme]) -> int:
    """Returns what a step's pass over one sample takes at its peak, gradients of weights aside.

    Gradients are taken by the hidden states: those of weights do not grow with the samples.
    """
    hidden = sample_1TH.to(block.device, block.dtype).detach().requires_grad_()
    weights = {name: block.tensors[name].detach().to(block.dtype).requires_grad_() for name in schemes}
    with LiveBytes() as live:
        output = block.forward(hidden, torch.zeros(1, dtype=torch.int64), weights)
        torch.autograd.grad(squared_error(output, torch.zeros_like(output)), hidden)
    return live.peak


def weight_bytes(block: Block, schemes: Mapping[str, QuantizationScheme], config: TuneConfig) -> dict[str, int]:
    """Returns the bytes of `tuned`, `gradients`, `sums`, `pieces` and `moving` of `BlockBytes`."""
    sizes = {name: block.tensors[name].numel() for name in schemes}
    count, largest = sum(sizes.values()), max(sizes.values(), default=0)
    if config.iters == 0:
        # Results stay until the block is done: a byte a weight.
        return {"tuned": count + _group_bytes(sizes, schemes), "gradients": 0, "sums": 0, **_pieces(block, largest, 0)}
    keeps_best = not config.not_use_best_mse or config.dynamic_max_gap > 0
    of_weight = 4 + block.dtype.itemsize + keeps_best + (12 if config.adam else 0)
    summed = config.adam or distributed.world_size() > 1
    gradients = 4 * count if summed else block.dtype.itemsize * count
    fused = all(scheme.data_type in FUSED_WEIGHTS for scheme in schemes.values()) and not config.adam
    fused = fused and all(runs_triton(block.tensors[name]) for name in schemes)
    return {
        "tuned": of_weight * count + _group_bytes(sizes, schemes),
        "gradients": gradients,
        "sums": 4 * count,
        **_pieces(block, largest, 0 if fused else largest),
    }


def _group_bytes(sizes: Mapping[str, int], schemes: Mapping[str, QuantizationScheme]) -> int:
    return sum(GROUP_BYTES * -(-size // _group(schemes[name])) for name, size in sizes.items())


def _group(scheme: QuantizationScheme) -> int:
    """Returns weights of a group; whole rows and matrices count as long ones."""
    size = scheme.group_size
    return size[0] * size[1] if isinstance(size, tuple) else size if size > 0 else 1024


def _pieces(block: Block, largest: int, moved: int) -> dict[str, int]:
    """Returns temporary bytes of searching and encoding the largest weight, and of moving one of `moved` elements."""
    piece = PIECE_ELEMENTS[block.device.type == "cpu"]
    search = largest + PIECE_COPIES * min(largest, piece)
    move = moved + PIECE_COPIES * min(moved, piece)
    return {"pieces": 4 * max(search, ENCODING_COPIES * largest), "moving": 4 * move}
