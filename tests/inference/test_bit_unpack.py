import pytest
import torch

from auto_round.inference.bit_unpack import pack_awq_columns, pack_rows, unpack_awq_columns, unpack_rows
from auto_round.layouts import LAYOUTS
from auto_round.layouts.bit_pack import codes_per_unit, pack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_rows_undoes_packing(bits):
    codes = torch.randint(0, 2**bits, (5, 3 * codes_per_unit(bits)), dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_bits(codes, bits), bits), codes)


def test_rows_may_have_any_strides():
    codes = torch.randint(0, 8, (5, 64), dtype=torch.uint8)
    words = pack_bits(codes, 3).t().contiguous().t()
    assert torch.equal(unpack_rows(words, 3), codes)


def test_awq_words_hold_columns_in_interleaved_order():
    # The word 0x75316420 holds, from its lowest nibble: columns 0 2 4 6 1 3 5 7; each column's value is its number.
    words = torch.tensor([[0x75316420]], dtype=torch.int32)
    assert unpack_awq_columns(words).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [96, 37])
def test_rows_are_packed_as_the_layouts_do(bits, count):
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8)
    assert torch.equal(pack_rows(codes, bits), pack_bits(codes, bits))


@pytest.mark.parametrize("columns", [24, 21])
def test_awq_columns_are_packed_as_the_layout_does(columns):
    scheme = QuantizationScheme(group_size=16)
    codes = torch.randint(0, 16, (columns, 32), dtype=torch.uint8)
    weight = QuantizedTensor(codes, torch.ones(columns, 2), None, scheme)
    assert torch.equal(pack_awq_columns(codes).t(), LAYOUTS["awq"].pack(weight)["qweight"])
