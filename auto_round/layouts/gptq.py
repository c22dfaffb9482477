"""The GPTQ layout: codes packed along the input dimension, two conventions for stored zero points.

`gptq` stores zero_point - 1, as AutoGPTQ, vLLM and SGLang expect; `gptq_zp` stores zero points as they are (GPTQModel's
"v2"). A zero point of 0 has no stored form in the first: the asymmetric integer grid here starts at 1 for that reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import LAYOUTS, why_not_integer_groups
from auto_round.layouts.bit_pack import pack_bits, packed_words, unpack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, effective_group_size, group_count


@dataclasses.dataclass(frozen=True, slots=True)
class GptqLayout:
    """qweight int32 (I*bits/32, O), qzeros int32 (G, O*bits/32), scales (G, O) in the scheme's scale dtype.

    Attributes:
        zero_offset: subtracted from zero points before they are stored (1 for AutoGPTQ's convention).
        group_index: also g_idx int32 (I,), the group of each input, which AutoGPTQ's checkpoints have.
    """

    name: str
    zero_offset: int
    group_index: bool = False

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:  # noqa: ARG002
        """Returns why a weight cannot be held, or None."""
        return why_not_integer_groups(scheme)

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        groups = group_count(width, scheme.group_size)
        index: dict[str, tuple[tuple[int, ...], str]] = {"g_idx": ((width,), "int32")} if self.group_index else {}
        return index | {
            "qweight": ((packed_words(width, scheme.bits), rows), "int32"),
            "qzeros": ((groups, packed_words(rows, scheme.bits)), "int32"),
            "scales": ((groups, rows), scheme.scale_dtype),
        }

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns qweight, qzeros, scales and, where the layout has it, g_idx.

        Raises:
            ValueError: a zero point below the layout's offset; it would wrap around to a wrong value.
        """
        bits, width = weight.scheme.bits, weight.shape[1]
        zeros_GO = weight.zero_points().t().to(torch.int16) - self.zero_offset
        if int(zeros_GO.min()) < 0:
            raise ValueError(f"layout {self.name} cannot store a zero point below {self.zero_offset}")
        index = {"g_idx": _group_of_inputs(width, weight.scheme.group_size)} if self.group_index else {}
        return index | {
            "qweight": pack_bits(weight.codes, bits).t().contiguous(),
            "qzeros": pack_bits(zeros_GO.to(torch.uint8).contiguous(), bits),
            "scales": weight.scale.t().to(getattr(torch, weight.scheme.scale_dtype)).contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight; a stored -1, which wraps to 2**bits - 1, reads as zero point 2**bits, as in engines."""
        rows, width = shape
        codes_OI = unpack_bits(tensors["qweight"].t().contiguous(), scheme.bits, width)
        zero_OG = None
        if not scheme.sym:
            zeros_GO = unpack_bits(tensors["qzeros"], scheme.bits, rows)
            zero_OG = (zeros_GO.to(torch.int16) + self.zero_offset).to(torch.int16).t().contiguous()
            zero_OG = zero_OG.clamp(max=255).to(torch.uint8)
        return QuantizedTensor(codes_OI, tensors["scales"].t().float().contiguous(), zero_OG, scheme)


def _group_of_inputs(width: int, group_size: int | tuple[int, int]) -> Tensor:
    """Returns (I,) int32: 0 for the first group of inputs, 1 for the next ..."""
    return (torch.arange(width) // effective_group_size(group_size, width)).to(torch.int32)


LAYOUTS.register("gptq")(GptqLayout("gptq", zero_offset=1))
LAYOUTS.register("gptq_zp")(GptqLayout("gptq_zp", zero_offset=0))
