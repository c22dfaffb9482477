from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

LAYOUT_NAMES = ("gptq", "gptq_zp")


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 7, 8)),
    sym=st.booleans(),
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    group_size=st.sampled_from([-1, 16, 32]),
    seed=st.integers(0, 2**31),
)
def test_pack_then_unpack_is_identity(make_weight, check_same_weight, name, bits, sym, rows, width, group_size, seed):
    weight = make_weight(rows, width, bits=bits, group_size=group_size, sym=sym, seed=seed)
    layout = LAYOUTS[name]
    packed = layout.pack(weight)
    check_same_weight(layout.unpack(packed, weight.scheme, weight.shape), weight)
    found = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in packed.items()}
    assert found == layout.specs(weight.scheme, weight.shape)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_words_by_hand():
    # One row of 8 codes of 4 bits with one group; zero point 3. Eight rows alike, so that a word of zeros is full.
    codes = torch.arange(8, dtype=torch.uint8).expand(8, 8).contiguous()
    scheme = QuantizationScheme(bits=4, group_size=8, sym=False)
    weight = QuantizedTensor(codes, torch.full((8, 1), 0.5), torch.full((8, 1), 3, dtype=torch.uint8), scheme)
    packed = {name: LAYOUTS[name].pack(weight) for name in LAYOUT_NAMES}
    for tensors in packed.values():
        assert tensors["qweight"].tolist() == [[0x76543210] * 8]
        assert tensors["scales"].tolist() == [[0.5] * 8]
        assert tensors["scales"].dtype == torch.float16
    assert packed["gptq"]["qzeros"].tolist() == [[0x22222222]]
    assert packed["gptq_zp"]["qzeros"].tolist() == [[0x33333333]]


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)], ids=str)
def test_the_stored_zero_point_of_a_symmetric_weight_is_one_less(make_weight, bits, word):
    weight = make_weight(16, 32, bits=bits, group_size=-1, sym=True)
    assert set(LAYOUTS["gptq"].pack(weight)["qzeros"].flatten().tolist()) == {word}


def test_a_shorter_last_group_has_its_own_scale(make_weight):
    weight = make_weight(8, 172, bits=4, group_size=128, sym=True)
    packed = LAYOUTS["gptq"].pack(weight)
    assert packed["qweight"].shape == (22, 8)
    assert packed["scales"].shape == (2, 8)


def test_scales_are_written_in_the_schemes_dtype():
    scheme = QuantizationScheme(bits=4, group_size=-1, scale_dtype="bf16")
    weight = QuantizedTensor(torch.zeros(8, 8, dtype=torch.uint8), torch.full((8, 1), 2.0**-100), None, scheme)
    packed = LAYOUTS["gptq"].pack(weight)
    assert packed["scales"].dtype == torch.bfloat16
    assert torch.equal(LAYOUTS["gptq"].unpack(packed, scheme, (8, 8)).scale, weight.scale)


def test_a_zero_point_of_0_is_refused_where_it_would_wrap():
    scheme = QuantizationScheme(bits=2, group_size=-1, sym=False)
    zero = torch.zeros(1, 1, dtype=torch.uint8)
    weight = QuantizedTensor(torch.zeros(1, 16, dtype=torch.uint8), torch.ones(1, 1), zero, scheme)
    with pytest.raises(ValueError, match="gptq cannot store a zero point below 1"):
        LAYOUTS["gptq"].pack(weight)
    packed = LAYOUTS["gptq_zp"].pack(weight)
    assert LAYOUTS["gptq_zp"].unpack(packed, scheme, (1, 16)).zero_point.tolist() == [[0]]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        pytest.param({"data_type": "mx_fp"}, "data_type=mx_fp", id="data type"),
        pytest.param({"group_size": 0}, "group_size=0", id="per tensor"),
        pytest.param({"bits": 3}, None, id="3 bits"),
        pytest.param({"sym": False}, None, id="asymmetric"),
        pytest.param({"group_size": -1}, None, id="per row"),
    ],
)
@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_what_cannot_be_held_is_refused_with_the_reason(name, change, part):
    reason = LAYOUTS[name].refuses(QuantizationScheme(**change), (8, 8))
    assert (reason is None) if part is None else part in reason


@pytest.mark.parametrize(
    ("checkpoint", "layout", "zero_offset"),
    [
        pytest.param("ar_w4g128_sym", "gptq", 1, id="auto_round 4 bits"),
        pytest.param("ar_w3g128_sym", "gptq", 1, id="auto_round 3 bits"),
        pytest.param("ar_w2g32_asym", "gptq_zp", 0, id="auto_round 2 bits asymmetric"),
        pytest.param("gptq_w4g128_sym", "gptq", 1, id="gptq 4 bits"),
        pytest.param("gptq_w3g128_sym", "gptq", 1, id="gptq 3 bits"),
    ],
)
def test_equals_the_bytes_of_the_reference(golden_layers, unpack_bit_string, checkpoint, layout, zero_offset):
    for golden in golden_layers(checkpoint):
        codes_OI = unpack_bit_string(golden.tensors["qweight"].T, golden.bits)
        zeros_OG = unpack_bit_string(golden.tensors["qzeros"], golden.bits).T + zero_offset
        weight = golden.quantized(codes_OI, zeros_OG)
        golden.check_same_bytes(LAYOUTS[layout].pack(weight))


def test_equals_the_bytes_of_the_reference_at_mixed_widths(golden_layers, unpack_bit_string):
    widths = []
    for golden in golden_layers("ar_mixed_4_8_16"):
        codes_OI = unpack_bit_string(golden.tensors["qweight"].T, golden.bits)
        zeros_OG = unpack_bit_string(golden.tensors["qzeros"], golden.bits).T + 1
        widths.append(golden.bits)
        if golden.bits == 2:
            # The reference kept the 2-bit asymmetric layer's zero points in 1..3, so none of them wraps.
            assert set(np.unique(zeros_OG)) == {1, 2, 3}
        weight = golden.quantized(codes_OI, zeros_OG)
        golden.check_same_bytes(LAYOUTS["gptq"].pack(weight))
    assert (widths.count(2), widths.count(8)) == (1, 1)


@pytest.mark.parametrize(
    ("checkpoint", "layout"),
    [
        ("ar_w4g128_sym", "gptq"),
        ("ar_w3g128_sym", "gptq"),
        ("ar_w2g32_asym", "gptq_zp"),
        ("gptq_w4g128_sym", "gptq"),
        ("gptq_w3g128_sym", "gptq"),
        ("ar_mixed_4_8_16", "gptq"),
    ],
)
def test_a_checkpoint_of_the_reference_reads_near_its_original_and_writes_back(
    golden_layers, check_near_original, checkpoint, layout
):
    for golden in golden_layers(checkpoint):
        rows = golden.tensors["scales"].shape[1]
        width = golden.tensors["qweight"].shape[0] * 32 // golden.bits
        tensors = {name: torch.from_numpy(array) for name, array in golden.tensors.items()}
        weight = LAYOUTS[layout].unpack(tensors, golden.scheme, (rows, width))
        check_near_original(golden, weight)
        golden.check_same_bytes(LAYOUTS[layout].pack(weight))


def test_a_stored_zero_point_that_wrapped_reads_as_engines_read_it(check_same_weight):
    # 2 bits: stored 3 is zero point 0 - 1 wrapped around, or 4. Engines add 1 without a mask, so it is 4.
    scheme = QuantizationScheme(bits=2, group_size=-1, sym=False)
    words = torch.full((1, 1), -1, dtype=torch.int32)
    tensors = {"qweight": words.expand(1, 16), "qzeros": words, "scales": torch.ones(1, 16, dtype=torch.float16)}
    weight = LAYOUTS["gptq"].unpack(tensors, scheme, (16, 16))
    assert set(weight.zero_point.flatten().tolist()) == {4}
    assert set(weight.dequantize().flatten().tolist()) == {-1.0}
    check_same_weight(LAYOUTS["gptq"].unpack(LAYOUTS["gptq"].pack(weight), scheme, (16, 16)), weight)
