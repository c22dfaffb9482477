"""Integer layouts of compressed-tensors: against its packer, its decompressor, and bytes that the reference wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor

PACKED, INT8 = LAYOUTS["ct_packed"], LAYOUTS["ct_int8"]
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
W8A8 = QuantizationScheme.from_dict({"bits": 8, "group_size": -1, "act_bits": 8, "act_group_size": -1})
STATIC = W8A8.replace(act_group_size=0, act_dynamic=False)


def specs_of(tensors):
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("rows", "width", "group_size"), [(8, 96, 32), (37, 80, -1), (1, 32, 16), (64, 128, 128)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_gives_what_was_packed(bits, rows, width, group_size, sym, make_weight, check_same_weight):
    weight = make_weight(rows, width, bits=bits, group_size=group_size, sym=sym)
    tensors = PACKED.pack(weight)
    check_same_weight(PACKED.unpack(tensors, weight.scheme, weight.shape), weight)
    assert specs_of(tensors) == PACKED.specs(weight.scheme, weight.shape)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_compressed_tensors(bits, make_weight):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = make_weight(37, 80, bits=bits, group_size=16, sym=False)
    tensors, offset = PACKED.pack(weight), 2 ** (bits - 1)
    codes, zeros = ((t.to(torch.int16) - offset).to(torch.int8) for t in (weight.codes, weight.zero_point))
    assert torch.equal(tensors["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
    assert tensors["weight_shape"].tolist() == [37, 80]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_decompresses_the_same_weights(bits, group_size, sym, make_weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization import QuantizationScheme as TheirScheme

    weight = make_weight(40, 96, bits=bits, group_size=group_size, sym=sym)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, symmetric=sym, **strategy)
    tensors = PACKED.pack(weight)
    tensors["weight_scale"] = tensors["weight_scale"].float()  # it computes in the precision of the scale
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(tensors, TheirScheme(targets=["Linear"], weights=args))
    assert torch.equal(theirs["weight"], weight.dequantize())


@pytest.mark.parametrize("scheme", [W8A8, STATIC], ids=["dynamic", "static"])
def test_int8_weights_are_codes_around_zero(scheme):
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    peak = torch.tensor(6.35) if scheme.activation.needs_calibration else None
    weight = QuantizedTensor(codes, torch.tensor([[-0.5]]), None, scheme, input_peak=peak)
    tensors = INT8.pack(weight)
    assert tensors["weight"].tolist() == [[-128, -1, 0, 127]]
    assert tensors["weight"].dtype == torch.int8
    assert tensors["weight_scale"].tolist() == [[-0.5]]
    assert specs_of(tensors) == INT8.specs(scheme, weight.shape)
    assert ("input_scale" in tensors) == (peak is not None)
    if peak is not None:  # 6.35 / 127 = 0.05, rounded to float16
        assert torch.equal(tensors["input_scale"], torch.tensor([0.05]).half())
    back = INT8.unpack(tensors, scheme, weight.shape)
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.input_peak is None) == (peak is None)


def test_an_activation_range_that_is_stored_once_is_stored_the_same_again():
    scale = torch.arange(1, 200).half() / 977
    for value in scale:
        tensors = {"weight": torch.zeros(1, 4, dtype=torch.int8), "weight_scale": torch.ones(1, 1).half()}
        weight = INT8.unpack(tensors | {"input_scale": value.reshape(1)}, STATIC, (1, 4))
        assert torch.equal(INT8.pack(weight)["input_scale"], value.reshape(1))


def test_int8_weights_are_those_that_compressed_tensors_decompresses(make_weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization import QuantizationScheme as TheirScheme

    weight = make_weight(24, 40, bits=8, group_size=-1, sym=True)
    args = QuantizationArgs(num_bits=8, strategy="channel")
    tensors = {name: tensor.float() if name == "weight_scale" else tensor for name, tensor in INT8.pack(weight).items()}
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    theirs = compressor.decompress(tensors, TheirScheme(targets=["Linear"], weights=args))
    assert torch.equal(theirs["weight"], weight.dequantize())


@pytest.mark.parametrize("layout", [PACKED, INT8], ids=["packed", "int8"])
def test_what_a_layout_cannot_hold_is_said(layout):
    shape = (8, 80)
    assert layout.refuses(W8A8, shape) is None
    assert layout.refuses(W8A8.replace(group_size=32), shape) == "groups of 32 in 80 inputs (only whole groups)"
    assert "group_size=0" in layout.refuses(W8A8.replace(group_size=0), shape)
    assert layout.refuses(QuantizationScheme.from_dict({"data_type": "fp"}), shape)


def test_int8_takes_eight_bits_symmetric_only():
    assert "bits=4" in INT8.refuses(W8A8.replace(bits=4), (8, 32))
    assert "sym=False" in INT8.refuses(W8A8.replace(sym=False), (8, 32))
    assert PACKED.refuses(W8A8.replace(sym=False), (8, 32)) is None


def golden_layers(folder):
    """Yields layer name -> its stored tensors, from a checkpoint that the reference wrote."""
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        keys = list(handle.keys())
        for layer in sorted({key.rpartition(".")[0] for key in keys if key.endswith(".weight_scale")}):
            yield {key.rpartition(".")[2]: handle.get_tensor(key) for key in keys if key.rpartition(".")[0] == layer}


@pytest.mark.parametrize(("name", "layout"), [("llmc_w4a16", PACKED), ("llmc_int8_w8a8", INT8)])
def test_bytes_are_those_of_the_reference(name, layout, shared, unpack_bit_string):
    (folder,) = (shared / "golden" / name).iterdir()
    args = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ]
    scheme = QuantizationScheme(bits=args["num_bits"], group_size=args["group_size"] or -1)
    layers = list(golden_layers(folder))
    assert len(layers) == 28
    for stored in layers:
        if layout is PACKED:
            codes = unpack_bit_string(stored["weight_packed"].numpy(), scheme.bits)
        else:
            codes = stored["weight"].numpy().astype(np.int16) + 128
        codes = torch.from_numpy(codes.astype(np.uint8))
        weight = QuantizedTensor(codes, stored["weight_scale"].float(), None, scheme)
        tensors = layout.pack(weight)
        assert set(tensors) == set(stored)
        for part, tensor in tensors.items():
            assert tensor.dtype == stored[part].dtype, part
            assert tensor.numpy().tobytes() == stored[part].numpy().tobytes(), part
        assert torch.equal(layout.unpack(stored, scheme, weight.shape).dequantize(), weight.dequantize())
