"""What a block sees while it is tuned: half of the tokens as the original model gives them, half as quantized blocks.

A block that only ever sees the few calibration samples with the errors of the blocks before it learns these errors by
heart. Source: the random dropping of QDrop, arXiv 2203.05740, by tokens; docs/accuracy.md has the figures.

Shape letters: N samples of all, B samples of a batch, T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = 16  # choices of each token, taken in turn; a sample meets a step about every tenth time


class InputMix:
    """Chooses for each token and step which of two inputs it is, whatever batch or rank its sample is in.

    Args:
        samples, tokens: N and T.
        generator: on the CPU.
    """

    def __init__(self, samples: int, tokens: int, generator: torch.Generator, device: torch.device) -> None:
        bits = torch.randint(0, 1 << PATTERNS, (samples, tokens), generator=generator, dtype=torch.int32)
        self.bits_NT = bits.to(device)

    def __call__(self, quantized_BTH: Tensor, original_BTH: Tensor, samples: Tensor, step: Tensor) -> Tensor:
        """Returns (B, T, H): tokens of either.

        Args:
            samples: (B,) int64.
            step: () int64 on the device, so that a captured step needs no host.
        """
        bits_BT = self.bits_NT[samples.to(self.bits_NT.device)]
        is_original = (bits_BT >> (step % PATTERNS).to(torch.int32)) & 1
        return torch.where(is_original.bool()[..., None], original_BTH, quantized_BTH)
