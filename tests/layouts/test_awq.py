from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

LAYOUT = LAYOUTS["awq"]


@given(
    sym=st.booleans(),
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    group_size=st.sampled_from([-1, 16, 32]),
    seed=st.integers(0, 2**31),
)
def test_pack_then_unpack_is_identity(make_weight, check_same_weight, sym, rows, width, group_size, seed):
    weight = make_weight(rows, width, bits=4, group_size=group_size, sym=sym, seed=seed)
    packed = LAYOUT.pack(weight)
    check_same_weight(LAYOUT.unpack(packed, weight.scheme, weight.shape), weight)
    found = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in packed.items()}
    assert found == LAYOUT.specs(weight.scheme, weight.shape)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_words_by_hand():
    # Output 0..7 with codes 0..7, one input. Nibbles from the low end hold outputs 0, 2, 4, 6, 1, 3, 5, 7.
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    scheme = QuantizationScheme(bits=4, group_size=-1, sym=False)
    zero = torch.arange(8, 16, dtype=torch.uint8)[:, None]
    scale = torch.arange(1, 9, dtype=torch.float32)[:, None]
    packed = LAYOUT.pack(QuantizedTensor(codes, scale, zero, scheme))
    assert packed["qweight"].tolist() == [[0x75316420]]
    # Zero points lie in the same order and are stored as they are: 8 10 12 14 9 11 13 15.
    assert packed["qzeros"].tolist() == [[0xFDB9ECA8 - 2**32]]
    assert packed["scales"].tolist() == [[1.0, 2, 3, 4, 5, 6, 7, 8]]


def test_the_zero_point_of_a_symmetric_weight_is_stored_as_8(make_weight):
    packed = LAYOUT.pack(make_weight(8, 32, bits=4, group_size=32, sym=True))
    assert packed["qzeros"].tolist() == [[0x88888888 - 2**32]]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param({"bits": 3}, ["bits=3", "only 4"], id="3 bits"),
        pytest.param({"bits": 8}, ["bits=8", "only 4"], id="8 bits"),
        pytest.param({"data_type": "mx_fp"}, ["data_type=mx_fp"], id="data type"),
        pytest.param({"group_size": 0}, ["group_size=0"], id="per tensor"),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(change, parts):
    reason = LAYOUT.refuses(QuantizationScheme(**change), (8, 8))
    assert all(part in reason for part in parts)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_four_bit_groups_are_held(sym):
    assert LAYOUT.refuses(QuantizationScheme(bits=4, sym=sym), (8, 8)) is None


def nibbles_to_columns(words_RW: np.ndarray) -> np.ndarray:
    """Returns (R, W * 8): AutoAWQ's order, written out column by column."""
    columns = np.empty((*words_RW.shape, 8), dtype=np.int64)
    unsigned = words_RW.view(np.uint32).astype(np.int64)
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        columns[..., column] = (unsigned // 16**nibble) % 16
    return columns.reshape(words_RW.shape[0], -1)


@pytest.mark.parametrize("checkpoint", ["ar_w4g128_asym", "awq_w4g128_asym"])
def test_equals_the_bytes_of_the_reference(golden_layers, checkpoint):
    for golden in golden_layers(checkpoint):
        codes_IO = nibbles_to_columns(golden.tensors["qweight"])
        zeros_GO = nibbles_to_columns(golden.tensors["qzeros"])
        golden.check_same_bytes(LAYOUT.pack(golden.quantized(codes_IO.T.copy(), zeros_GO.T.copy())))


@pytest.mark.parametrize("checkpoint", ["ar_w4g128_asym", "awq_w4g128_asym"])
def test_a_checkpoint_of_the_reference_dequantizes_near_its_original(golden_layers, check_near_original, checkpoint):
    for golden in golden_layers(checkpoint):
        tensors = {name: torch.from_numpy(array) for name, array in golden.tensors.items()}
        width, rows = golden.tensors["qweight"].shape[0], golden.tensors["scales"].shape[1]
        check_near_original(golden, LAYOUT.unpack(tensors, golden.scheme, (rows, width)))
