"""A tuning step of one weight in one pass over it, where a Triton kernel exists for its data type, on NVIDIA GPUs.

Without it a step makes some twenty passes over tensors as large as the weight. `tuned_weight` is the meaning, and what
runs everywhere else.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from auto_round.device import runs_triton
from auto_round.registry import Registry
from auto_round.tuning.tuned_weight import TunedWeight

# Weights of one program; a group at least.
PROGRAM_ELEMENTS = 2048


class FusedWeight(Protocol):
    """Takes the steps of one weight. The class is registered in FUSED_WEIGHTS under the data types it is for.

    Attributes:
        dequantized: (O, I) in the block's precision, always what the weight stands for.
    """

    dequantized: Tensor

    def __init__(self, tuned: TunedWeight, dtype: torch.dtype) -> None:
        """Makes `dequantized` from the parameters of a weight, which steps change in place."""
        ...

    @staticmethod
    def fits(tuned: TunedWeight) -> bool:
        """Returns whether the kernel knows groups as those of the weight."""
        ...

    def move(
        self, gradient_OI: Tensor, decay: Tensor, rounding_size: float, clip_size: float, unit: float = 1.0
    ) -> None:
        """Moves offsets and clip factors by the signs of their gradients, times `decay`, a scalar on the device.

        `unit` is what the gradient has to be multiplied with to be that of the loss.
        """
        ...


FUSED_WEIGHTS: Registry[type[FusedWeight]] = Registry("data type with a kernel for its tuning steps")


def fused_weight(tuned: TunedWeight, dtype: torch.dtype) -> FusedWeight | None:
    """Returns what takes the steps of a weight with a kernel, or None where there is none for it."""
    if tuned.data_type.name not in FUSED_WEIGHTS or not runs_triton(tuned.weight):
        return None
    kind = FUSED_WEIGHTS[tuned.data_type.name]
    assert tuned.params["rounding"].is_contiguous()  # kernels index it themselves
    return kind(tuned, dtype) if kind.fits(tuned) else None
