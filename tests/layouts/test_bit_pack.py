from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from auto_round.layouts.bit_pack import codes_per_unit, pack_bits, packed_words, unpack_bits

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def as_signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        # 01 10 11 00 from the low end: 0b00_11_10_01 = 0x39 in each byte.
        pytest.param(2, [1, 2, 3, 0] * 4, [0x39393939], id="2 bits"),
        # Nibbles from the low end, so the hexadecimal word reads backwards.
        pytest.param(4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321], id="4 bits"),
        pytest.param(4, [15] * 8, [0xFFFFFFFF], id="4 bits all ones"),
        pytest.param(8, [0x01, 0x80, 0x7F, 0xFF], [0xFF7F8001], id="8 bits"),
        # Codes 0..7 eight times over give the octal digits 76543210 = 0xFAC688 in 24 bits, repeated end to end.
        pytest.param(3, list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA], id="3 bits"),
        # Only code 10 set: bits 30..32, so two bits end word 0 and one begins word 1.
        pytest.param(3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x1, 0x0], id="3 bits over a border"),
        # Code 21: bits 63..65, one bit in word 1 and two in word 2.
        pytest.param(3, [0] * 21 + [7] + [0] * 10, [0x0, 0x80000000, 0x3], id="3 bits over the second border"),
        # Code 6 of 5 bits: bits 30..34.
        pytest.param(5, [0] * 6 + [31] + [0] * 25, [0xC0000000, 0x7, 0, 0, 0], id="5 bits over a border"),
        # Code 5 of 6 bits: bits 30..35.
        pytest.param(6, [0] * 5 + [63] + [0] * 10, [0xC0000000, 0xF, 0], id="6 bits over a border"),
        # Code 4 of 7 bits: bits 28..34.
        pytest.param(7, [0] * 4 + [127] + [0] * 27, [0xF0000000, 0x7, 0, 0, 0, 0, 0], id="7 bits over a border"),
    ],
)
def test_words_by_hand(bits, codes, words):
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [as_signed(word) for word in words]
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize(
    ("bits", "unit"), [(1, 32), (2, 16), (3, 32), (4, 8), (5, 32), (6, 16), (7, 32), (8, 4)], ids=str
)
def test_a_unit_is_the_fewest_codes_that_fill_whole_words(bits, unit):
    assert codes_per_unit(bits) == unit
    assert unit * bits % 32 == 0
    assert all(fewer * bits % 32 for fewer in range(1, unit))


@pytest.mark.parametrize(
    ("count", "bits", "words"), [(8, 4, 1), (9, 4, 2), (1, 3, 3), (32, 3, 3), (33, 3, 6), (0, 4, 0), (172, 4, 22)]
)
def test_the_count_of_words_is_rounded_up_to_whole_units(count, bits, words):
    assert packed_words(count, bits) == words
    assert pack_bits(torch.zeros(count, dtype=torch.uint8), bits).shape == (words,)


@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 4), count=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_pack_then_unpack_is_identity(bits, rows, count, seed):
    codes = random_codes(rows, count, bits=bits, seed=seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_words(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@given(bits=st.sampled_from(WIDTHS), count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_codes_lie_end_to_end_lowest_bits_first(bits, count, seed):
    codes = random_codes(count, bits=bits, seed=seed)
    number = sum(code << (index * bits) for index, code in enumerate(codes.tolist()))
    words = pack_bits(codes, bits).tolist()
    assert sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words)) == number


@given(bits=st.sampled_from(WIDTHS), seed=st.integers(0, 2**31))
def test_unpack_then_pack_is_identity_on_any_words(bits, seed):
    words_per_unit = codes_per_unit(bits) * bits // 32
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (3, 2 * words_per_unit), generator=generator, dtype=torch.int64)
    words = words.to(torch.int32)
    assert torch.equal(pack_bits(unpack_bits(words, bits, 2 * codes_per_unit(bits)), bits), words)


def test_leading_dimensions_are_kept():
    codes = random_codes(2, 3, 40, bits=3)
    packed = pack_bits(codes, 3)
    assert packed.shape == (2, 3, 6)
    assert torch.equal(packed[1, 2], pack_bits(codes[1, 2], 3))
    assert torch.equal(unpack_bits(packed, 3, 40), codes)


def test_a_transposed_input_is_packed_by_its_values():
    codes = random_codes(16, 6, bits=4)
    assert torch.equal(pack_bits(codes.t(), 4), pack_bits(codes.t().contiguous(), 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [32, 37])
def test_equals_the_packing_of_compressed_tensors(bits, count):
    codes = random_codes(5, count, bits=bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_bits(codes, bits), pack_to_int32(signed, bits))
