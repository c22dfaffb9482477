"""Block types of GGUF files: codes, scales and minima of 32 or 256 neighbouring weights, one block behind the other.

Packed tensors have one entry, `blocks`: (O, I / block size * block bytes) uint8, exactly as llama.cpp reads them. Bit
fields are first brought to (N, fields) with one number each, then shifted together; pack and unpack share the order.
Super-blocks (k-quants) are in `gguf_superblocks.py`.

Source: block_q4_0 to block_q8_0 in ggml-common.h; `gguf.quants` decodes the same bytes in the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.layouts.base import LAYOUTS, Specs
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tensors import QuantizedTensor

SMALL_BLOCK = 32
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class BlockType:
    """What all block types have in common.

    Attributes:
        name: of the layout: "gguf_" and GGUF's name of the type in lower case.
        block_size: weights of a block.
        block_bytes: bytes of a block.
    """

    name: str
    block_size: int
    block_bytes: int

    @property
    def gguf_name(self) -> str:
        """GGUF's name of the type, e.g. "Q4_K"."""
        return self.name.removeprefix("gguf_").upper()

    @property
    def scheme(self) -> QuantizationScheme:
        """The one scheme whose weights the type holds."""
        return PRESET_SCHEMES[f"GGUF:{self.gguf_name}"]

    def refuses(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> str | None:
        """Returns why a weight of this scheme and (out, in) shape cannot be held, or None."""
        for field in dataclasses.fields(scheme):
            asked, held = getattr(scheme, field.name), getattr(self.scheme, field.name)
            if asked != held:
                return f"{field.name}={asked} ({self.gguf_name} has {held})"
        if shape[1] % self.block_size:
            return f"{shape[1]} inputs (blocks of {self.gguf_name} have {self.block_size} weights)"
        return None

    def specs(self, scheme: QuantizationScheme, shape: tuple[int, int]) -> Specs:  # noqa: ARG002
        """Returns tensor name -> (shape, dtype name)."""
        return {"blocks": ((shape[0], shape[1] // self.block_size * self.block_bytes), "uint8")}


@dataclasses.dataclass(frozen=True, slots=True)
class SmallBlock(BlockType):
    """Q4_0, Q4_1, Q5_0, Q5_1: float16 scale, float16 minimum (_1), the fifth bits, the low four bits.

    Q8_0: float16 scale and signed bytes.
    """

    def pack(self, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Returns the blocks."""
        codes_NK = weight.codes.reshape(-1, SMALL_BLOCK)
        parts = [half_bytes(weight.scale)]
        if weight.offset is not None:
            parts.append(half_bytes(weight.offset))
        if weight.scheme.bits == 8:
            parts.append(codes_NK ^ 0x80)  # a zero point of 128 and two's complement differ in the top bit
        if weight.scheme.bits == 5:
            parts.append(join_bits((codes_NK >> 4).reshape(-1, 4, 8), 1))
        if weight.scheme.bits < 8:
            parts.append(join_bits((codes_NK & 15).reshape(-1, 2, 16).transpose(1, 2), 4))
        return {"blocks": torch.cat(parts, dim=1).reshape(weight.shape[0], -1)}

    def unpack(
        self, tensors: Mapping[str, Tensor], scheme: QuantizationScheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Returns the weight that `pack` was given."""
        bytes_NB = tensors["blocks"].reshape(-1, self.block_bytes)
        per_group = (shape[0], shape[1] // SMALL_BLOCK)
        scale, rest = from_half_bytes(bytes_NB[:, :2]).reshape(per_group), bytes_NB[:, 2:]
        offset = None
        if not scheme.sym:
            offset, rest = from_half_bytes(rest[:, :2]).reshape(per_group), rest[:, 2:]
        if scheme.bits == 8:
            codes = rest ^ 0x80
        else:
            codes = split_bits(rest[:, -16:], 4).transpose(1, 2).reshape(-1, SMALL_BLOCK)
        if scheme.bits == 5:
            codes = codes | split_bits(rest[:, :4], 1).reshape(-1, SMALL_BLOCK) << 4
        return QuantizedTensor(codes.reshape(shape), scale, None, scheme, offset=offset)


def join_bits(fields: Tensor, bits: int) -> Tensor:
    """Returns (..., n) uint8: the last dimension of (..., n, 8 / bits) fields in one byte, the first one lowest."""
    joined = torch.zeros_like(fields[..., 0])
    for index in range(8 // bits):
        joined |= fields[..., index] << (bits * index)
    return joined


def split_bits(joined: Tensor, bits: int) -> Tensor:
    """Returns (..., n, 8 / bits) uint8, the inverse of `join_bits`."""
    return torch.stack([(joined >> (bits * index)) & (2**bits - 1) for index in range(8 // bits)], dim=-1)


def half_bytes(values: Tensor) -> Tensor:
    """Returns (n, 2) uint8: n float16 numbers, given as float32 of any shape."""
    return values.half().reshape(-1, 1).contiguous().view(torch.uint8)


def from_half_bytes(bytes_N2: Tensor) -> Tensor:
    """Returns (n,) float32, the inverse of `half_bytes`."""
    return bytes_N2.contiguous().view(torch.float16).float().reshape(-1)


def float_bytes(values: Tensor, gguf_name: str) -> Tensor:
    """Returns (..., I * bytes) uint8 of unquantized values as F32, F16 or BF16, rounded to nearest.

    float16 ends at 65504; larger values become that instead of infinity.
    """
    dtype = FLOATS[gguf_name]
    if dtype == torch.float16:
        values = values.clamp(-65504, 65504)
    return values.to(dtype).contiguous().view(torch.uint8)


def block_type_of(scheme: QuantizationScheme) -> str:
    """Returns GGUF's name of the block type that holds weights of a scheme, e.g. "Q4_K".

    Raises:
        UnsupportedError: there is none.
    """
    for name, layout in LAYOUTS.items():
        if isinstance(layout, BlockType) and layout.scheme == scheme:
            return name.removeprefix("gguf_").upper()
    raise UnsupportedError(
        f"GGUF has no block type for {scheme} (scale_dtype={scheme.scale_dtype}). Use one of the schemes gguf:q4_0, "
        "q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k"
    )


for _name, _bytes in (("q4_0", 18), ("q4_1", 20), ("q5_0", 22), ("q5_1", 24), ("q8_0", 34)):
    LAYOUTS.register(f"gguf_{_name}")(SmallBlock(f"gguf_{_name}", SMALL_BLOCK, _bytes))
