"""Super-blocks decoded one weight at a time, after the comments of ggml-common.h and dequantize_row_q*_K."""

from __future__ import annotations

import struct

import pytest
import torch

from auto_round.layouts import LAYOUTS


def half(block: bytes, at: int) -> float:
    return struct.unpack("<e", block[at : at + 2])[0]


def six_bit_pair(scales: bytes, group: int) -> tuple[int, int]:
    """Scale and minimum code of a group of Q4_K or Q5_K (get_scale_min_k4)."""
    if group < 4:
        return scales[group] & 63, scales[group + 4] & 63
    low = scales[group + 4]
    return (low & 15) | (scales[group - 4] >> 6) << 4, (low >> 4) | (scales[group] >> 6) << 4


def decode_q2_k(block: bytes, i: int) -> float:
    code = block[16 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
    both = block[i // 16]
    return half(block, 80) * (both & 15) * code - half(block, 82) * (both >> 4)


def decode_q3_k(block: bytes, i: int) -> float:
    low = block[32 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
    code = low if block[i % 32] >> i // 32 & 1 else low - 4
    group, scales = i // 16, block[96:108]
    step = (scales[group % 8] >> group // 8 * 4 & 15) | (scales[8 + group % 4] >> group // 4 * 2 & 3) << 4
    return half(block, 108) * (step - 32) * code


def decode_q4_k(block: bytes, i: int) -> float:
    step, minimum = six_bit_pair(block[4:16], i // 32)
    code = block[16 + i // 64 * 32 + i % 32] >> i % 64 // 32 * 4 & 15
    return half(block, 0) * step * code - half(block, 2) * minimum


def decode_q5_k(block: bytes, i: int) -> float:
    step, minimum = six_bit_pair(block[4:16], i // 32)
    low = block[48 + i // 64 * 32 + i % 32] >> i % 64 // 32 * 4 & 15
    code = low | (block[16 + i % 32] >> i // 32 & 1) << 4
    return half(block, 0) * step * code - half(block, 2) * minimum


def decode_q6_k(block: bytes, i: int) -> float:
    part, within = divmod(i, 128)
    low = block[part * 64 + within % 64] >> within // 64 * 4 & 15
    high = block[128 + part * 32 + within % 32] >> within // 32 * 2 & 3
    (step,) = struct.unpack("b", block[192 + i // 16 : 193 + i // 16])
    return half(block, 208) * step * ((low | high << 4) - 32)


DECODERS = {
    "q2_k": decode_q2_k,
    "q3_k": decode_q3_k,
    "q4_k": decode_q4_k,
    "q5_k": decode_q5_k,
    "q6_k": decode_q6_k,
}


@pytest.mark.parametrize("name", DECODERS)
def test_each_weight_of_a_super_block_is_where_the_format_says(name):
    layout = LAYOUTS[f"gguf_{name}"]
    generator = torch.Generator().manual_seed(4)
    ((_, size), _) = layout.specs(layout.scheme, (1, 256))["blocks"]
    blocks = torch.randint(0, 256, (1, size), generator=generator, dtype=torch.uint8)
    for start in {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}.get(name, (0, 2)):
        # A power of two: then Python's float64 products are those of float32, exactly.
        blocks[0, start : start + 2] = torch.tensor([0.125], dtype=torch.float16).view(torch.uint8)
    values = layout.unpack({"blocks": blocks}, layout.scheme, (1, 256)).dequantize()[0].tolist()
    assert values == [DECODERS[name](bytes(blocks[0].tolist()), i) for i in range(256)]
    assert len(set(values)) > 30


@pytest.mark.parametrize("name", DECODERS)
def test_a_super_block_of_zeros_has_no_codes_of_scales(name):
    layout = LAYOUTS[f"gguf_{name}"]
    weight = layout.unpack({"blocks": torch.zeros(1, layout.block_bytes, dtype=torch.uint8)}, layout.scheme, (1, 256))
    packed = layout.pack(weight)["blocks"]
    again = layout.unpack({"blocks": packed}, layout.scheme, (1, 256))
    assert not again.dequantize().any()
    assert torch.equal(again.scale, torch.zeros_like(again.scale))
