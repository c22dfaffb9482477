"""Blocks of 32 weights, against llama.cpp's own decoder where it is installed, and by hand."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.layouts import LAYOUTS
from auto_round.layouts.gguf_blocks import BlockType, block_type_of, float_bytes
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tuning.rtn import round_plain

SMALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
ALL = (*SMALL, "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SHAPE = (6, 512)


def layout_of(name: str) -> BlockType:
    layout = LAYOUTS[f"gguf_{name}"]
    assert isinstance(layout, BlockType)
    return layout


def random_blocks(name: str, seed: int = 0) -> torch.Tensor:
    """Returns bytes of which every one is drawn, but float16 numbers are finite and not zero."""
    layout, generator = layout_of(name), torch.Generator().manual_seed(seed)
    ((rows, width), _) = layout.specs(layout.scheme, SHAPE)["blocks"]
    blocks = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
    halves = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}.get(name, (0,) if layout.scheme.sym else (0, 2))
    cut = blocks.view(-1, layout.block_bytes)
    for start in halves:
        drawn = (torch.rand(len(cut), 1, generator=generator) + 0.5).half()
        cut[:, start : start + 2] = drawn.view(torch.uint8)
    return blocks


@pytest.mark.parametrize("name", ALL)
def test_every_bit_of_a_block_is_kept(name):
    """Any file's blocks, unpacked and packed, are the same bytes: no bit of them is unused."""
    layout, blocks = layout_of(name), random_blocks(name)
    weight = layout.unpack({"blocks": blocks}, layout.scheme, SHAPE)
    assert weight.codes.dtype == torch.uint8
    assert torch.equal(layout.pack(weight)["blocks"], blocks)


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_decoded_as_llama_cpp_does(name):
    quants = pytest.importorskip("gguf.quants")
    layout, blocks = layout_of(name), random_blocks(name, seed=1)
    weight = layout.unpack({"blocks": blocks}, layout.scheme, SHAPE)
    kind = getattr(pytest.importorskip("gguf").GGMLQuantizationType, layout.gguf_name)
    assert torch.equal(weight.dequantize(), torch.from_numpy(quants.dequantize(blocks.numpy(), kind)))


@pytest.mark.parametrize("name", ALL)
def test_a_rounded_weight_survives_packing(name, check_same_weight):
    layout = layout_of(name)
    weight = round_plain(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * 0.05, layout.scheme)
    assert layout.refuses(weight.scheme, SHAPE) is None
    packed = layout.pack(weight)
    assert (tuple(packed["blocks"].shape), "uint8") == layout.specs(weight.scheme, SHAPE)["blocks"]
    back = layout.unpack(packed, weight.scheme, SHAPE)
    check_same_weight(back, weight)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_a_block_of_four_bits_worked_by_hand():
    """Scale -0.5; weight i of the first half is the low half of byte i, of the second half the high one; minus 8."""
    layout = layout_of("q4_0")
    blocks = torch.zeros(1, 18, dtype=torch.uint8)
    blocks[0, :2] = torch.tensor([-0.5], dtype=torch.float16).view(torch.uint8)
    blocks[0, 2], blocks[0, 17] = 0x9F, 0x08
    values = layout.unpack({"blocks": blocks}, layout.scheme, (1, 32)).dequantize()[0].tolist()
    assert (values[0], values[16], values[15], values[31]) == (-3.5, -0.5, 0.0, 4.0)
    assert set(values[1:15]) == {4.0}


def test_a_layout_says_what_it_does_not_hold():
    layout = layout_of("q4_k")
    assert "300 inputs" in (layout.refuses(layout.scheme, (4, 300)) or "")
    assert "bits=5" in (layout.refuses(PRESET_SCHEMES["GGUF:Q5_K"], (4, 256)) or "")
    assert "data_type=int" in (layout.refuses(QuantizationScheme(group_size=32, sym=False), (4, 256)) or "")


@pytest.mark.parametrize("name", ALL)
def test_a_scheme_names_its_block_type(name):
    assert block_type_of(PRESET_SCHEMES[f"GGUF:{name.upper()}"]) == name.upper()


def test_a_scheme_without_a_block_type_is_refused():
    with pytest.raises(UnsupportedError, match="q4_k, q5_k"):
        block_type_of(QuantizationScheme(bits=3, group_size=128))


def test_floats_are_stored_rounded_and_finite():
    values = torch.tensor([[1.0, -2.5, 1e6]])
    assert float_bytes(values, "F16").view(torch.float16).tolist() == [[1.0, -2.5, 65504.0]]
    assert torch.equal(float_bytes(values, "BF16").view(torch.bfloat16), values.bfloat16())
    assert torch.equal(float_bytes(values, "F32").view(torch.float32), values)
