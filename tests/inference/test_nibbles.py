import pytest
import torch

from auto_round.inference.nibbles import FACTOR, pack_nibbles, tiles_of

WIDTHS = (64, 64, 16)


def make(bits=4, group_size=32):
    codes = torch.randint(0, 2**bits, (sum(WIDTHS), 96), dtype=torch.uint8)
    nibbles = pack_nibbles(codes, bits, group_size, WIDTHS)
    return codes, nibbles, tiles_of(nibbles, 96, group_size, WIDTHS)


def test_two_codes_share_a_byte():
    # Group of 4 features of 8 rows that hold codes 0, 7, 8, 15: signed -8, -1, 0, 7, as nibbles 8, 15, 0, 7.
    codes = torch.tensor([[0, 7, 8, 15]], dtype=torch.uint8).expand(8, 4)
    nibbles = pack_nibbles(codes, 4, 4, (8,))
    assert nibbles.view(2, 8).tolist() == [[0x08] * 8, [0x7F] * 8]
    assert nibbles.numel() * 2 == codes.numel()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_come_back(bits):
    codes, _, tiles = make(bits)
    assert [tile.features for tile in tiles] == [slice(0, 64), slice(64, 128), slice(128, 144)]
    assert torch.equal(torch.cat([tile.codes(bits) for tile in tiles]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_matrices_hold_multiples_of_signed_codes(bits):
    codes, _, tiles = make(bits)
    for count in (1, 2, 3, 5):
        bunches = [torch.stack(list(matrices)) for matrices in tiles[1].matrices(count)]
        assert [len(bunch) for bunch in bunches] == {1: [1, 1, 1], 2: [2, 1], 3: [3], 5: [3]}[count]
        assert bunches[0].dtype == torch.int8
        expected = FACTOR * (codes[64:128].int() - 2 ** (bits - 1))
        assert torch.equal(torch.cat(bunches).flatten(0, 1).t().int(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantized_weights_are_scale_times_code_less_zero_point(dtype):
    codes, _, tiles = make()
    scale, zero = torch.randn(3, 144), torch.randint(0, 17, (3, 144), dtype=torch.int16)
    for tile in tiles:
        some = tile.features
        weight = tile.dequantize(scale[:, some] / FACTOR, FACTOR * (zero[:, some] - 8), dtype)
        plain = codes[some].float() - zero[:, some].t().repeat_interleave(32, dim=1)
        expected = plain * scale[:, some].t().repeat_interleave(32, dim=1)
        assert torch.equal(weight.t(), expected.to(dtype))
