"""The AWQ layout ("gemm"): 4-bit codes packed along the output dimension in an interleaved order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.layouts.base import LAYOUTS, why_not_integer_groups
from auto_round.layouts.bit_pack import packed_words, unpack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

# Nibble i of a word holds column ORDER[i] of its eight. Source: AutoAWQ's gemm packing; golden checkpoint in the tests.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True, slots=True)
class AwqLayout:
    """qweight int32 (I, O/8), qzeros int32 (G, O/8) with true zero points, scales (G, O)."""

    name: str = "awq"

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:  # noqa: ARG002
        """Returns why a weight cannot be held, or None."""
        return why_not_integer_groups(scheme) or (None if scheme.bits == 4 else f"bits={scheme.bits} (only 4)")

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns tensor name -> (shape, dtype name)."""
        rows, width = shape
        groups = group_count(width, scheme.group_size)
        words = packed_words(rows, 4)
        return {
            "qweight": ((width, words), "int32"),
            "qzeros": ((groups, words), "int32"),
            "scales": ((groups, rows), scheme.scale_dtype),
        }

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns qweight, qzeros and scales."""
        return {
            "qweight": _pack_outputs(weight.codes),
            "qzeros": _pack_outputs(weight.zero_points()),
            "scales": weight.scale.t().to(getattr(torch, weight.scheme.scale_dtype)).contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        rows, _ = shape
        codes_OI = _unpack_columns(tensors["qweight"], rows).t().contiguous()
        zero_OG = None if scheme.sym else _unpack_columns(tensors["qzeros"], rows).t().contiguous()
        return QuantizedTensor(codes_OI, tensors["scales"].t().float().contiguous(), zero_OG, scheme)


def _pack_outputs(codes_OR: Tensor) -> Tensor:
    """Returns (R, O/8) int32. Words are made where whole rows lie side by side, and turned when they are few."""
    codes_OR = torch.nn.functional.pad(codes_OR, (0, 0, 0, -codes_OR.shape[0] % 8))
    eights = codes_OR.reshape(-1, 8, codes_OR.shape[1])
    words = torch.zeros_like(eights[:, 0], dtype=torch.int32)
    for byte in range(4):
        low, high = (eights[:, ORDER[2 * byte + half]] for half in (0, 1))
        words |= (low | (high << 4)).to(torch.int32) << (8 * byte)
    return words.t().contiguous()


def _unpack_columns(words_RW: Tensor, columns: int) -> Tensor:
    eights = unpack_bits(words_RW, 4, words_RW.shape[1] * 8).reshape(words_RW.shape[0], -1, 8)
    inverse = [ORDER.index(column) for column in range(8)]
    return eights[..., inverse].reshape(words_RW.shape[0], -1)[:, :columns]


LAYOUTS.register("awq")(AwqLayout())
