"""What tuners take and give. A tuner is a pure function of a block: it leaves the modules as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from auto_round.block import Block
from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.plan import FUSED_GROUPS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import BlockResult


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TuningTask:
    """One block to quantize.

    Attributes:
        block: the block, with its tensors on the compute device.
        schemes: weight name -> scheme, for the weights to quantize.
        transposed: names of weights stored (in, out).
        inputs: (N, T, H) what the block sees, as the quantized blocks before it give it.
        original_inputs: (N, T, H) what the original model gives it; the same tensor when only one chain is kept, None
            when the tuner does not need it.
        targets: (N, T, H) the original block's output, or None when the tuner does not need it.
        mask: (N, T) bool, False for padding, or None.
        batches: samples of each forward pass.
        seed: of everything random in this block, already mixed with its name.
        micro_batch: samples of one forward and backward pass of a step; None for as many as `TuneConfig.batch_size`.
        importance: weight name -> (I,) mean squares of input channels that were given, in place of measured ones.
    """

    block: Block
    schemes: Mapping[str, QuantizationScheme]
    transposed: frozenset[str]
    inputs: Tensor
    original_inputs: Tensor | None
    targets: Tensor | None
    mask: Tensor | None
    batches: Sequence[slice]
    seed: int
    micro_batch: int | None = None
    importance: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """Returns the original weight (O, I), in its stored precision, on the compute device.

        Args:
            name: of a weight, or of a stack of the block: the rows of all experts follow each other then.
        """
        stored = self.block.tensors[name]
        return stored.t() if name in self.transposed else stored.flatten(0, -2)

    def tensor_peaks(self) -> dict[str, Tensor]:
        """Returns `joined_peaks` of the block's weights."""
        return joined_peaks({name: self.weight(name) for name in self.schemes}, self.schemes)

    def as_parameter(self, name: str, weight_OI: Tensor) -> Tensor:
        """Returns a weight, or a stack, in the form and precision that the block's forward takes."""
        if name in self.block.stacks:
            return weight_OI.unflatten(0, (len(self.block.stacks[name]), -1)).to(self.block.dtype)
        return (weight_OI.t() if name in self.transposed else weight_OI).to(self.block.dtype)

    def rows(self, name: str, parameter: Tensor) -> Tensor:
        """Returns (O, I): what `as_parameter` was given for a tensor like its result."""
        return parameter.t() if name in self.transposed else parameter.flatten(0, -2)

    def generator(self) -> torch.Generator:
        """Returns a fresh CPU generator for this block."""
        return torch.Generator().manual_seed(self.seed)


def joined_peaks(weights: Mapping[str, Tensor], schemes: Mapping[str, QuantizationScheme]) -> dict[str, Tensor]:
    """Returns weight name -> () float32 largest magnitude of it and those that serving engines join with it.

    Nothing where no data type has a scale for a whole tensor: finding it takes a pass over all weights.
    """
    if not any(DATA_TYPES[scheme.data_type].has_tensor_scale for scheme in schemes.values()):
        return {}
    return join_peaks({name: weight.abs().amax().float() for name, weight in weights.items()})


def join_peaks(peaks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weight name -> the largest magnitude of it and those that serving engines join with it, given its own."""
    found = dict(peaks)
    for members in FUSED_GROUPS:
        for name in peaks:
            stem, _, leaf = name.removesuffix(".weight").rpartition(".")
            joined = [f"{stem}.{member}.weight" for member in members if f"{stem}.{member}.weight" in peaks]
            if leaf == members[0]:
                found |= dict.fromkeys(joined, torch.stack([found[other] for other in joined]).amax())
    return found


def tuned_together(task: TuningTask) -> dict[str, tuple[str, ...]]:
    """Returns name of a weight, or of a stack -> the weights that it holds, in the order of the block's schemes.

    Parts of a stack are tuned together where all have one scheme, and no scale is shared by rows of a whole weight.
    """
    stack_of = {}
    for stack, parts in task.block.stacks.items():
        schemes = {task.schemes.get(part) for part in parts}
        scheme = schemes.pop()
        if not schemes and scheme is not None and _has_rows_of_its_own(scheme):
            stack_of |= dict.fromkeys(parts, stack)
    units: dict[str, tuple[str, ...]] = {}
    for name in task.schemes:
        unit = stack_of.get(name, name)
        units[unit] = task.block.stacks.get(unit, (name,))
    return units


def _has_rows_of_its_own(scheme: QuantizationScheme) -> bool:
    return isinstance(scheme.group_size, int) and scheme.group_size != 0


class Tuner(Protocol):
    """Chooses codes, scales and zero points for the weights of a block."""

    needs_targets: bool
    needs_original_inputs: bool

    def __call__(self, task: TuningTask, config: TuneConfig) -> BlockResult:
        """Returns the quantized weights of a block."""
        ...
