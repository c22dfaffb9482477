"""Float layouts of compressed-tensors: against its decompressor, and bytes that the reference wrote."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from auto_round.elements import E2M1, E4M3, ELEMENTS
from auto_round.layouts import LAYOUTS
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tensors import QuantizedTensor, group_count

FP8 = PRESET_SCHEMES["FP8_DYNAMIC"]
# id -> layout, scheme, compression format of compressed-tensors, its arguments of the weight
FLOAT8 = {"num_bits": 8, "type": "float"}
CASES = {
    "fp8 row": ("fp8", FP8, "float-quantized", {**FLOAT8, "strategy": "channel"}),
    "fp8 tensor": ("fp8", FP8.replace(group_size=0), "float-quantized", {**FLOAT8, "strategy": "tensor"}),
    "fp8 block": (
        "fp8",
        PRESET_SCHEMES["FP8_BLOCK"].replace(group_size=(16, 32), act_group_size=32),
        "float-quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [16, 32]},
    ),
    "fp8 static": ("fp8", PRESET_SCHEMES["FP8_STATIC"], "float-quantized", {**FLOAT8, "strategy": "channel"}),
    "mxfp8": (
        "mxfp8",
        PRESET_SCHEMES["MXFP8"],
        "mxfp8-quantized",
        {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "mxfp4": (
        "mxfp4",
        PRESET_SCHEMES["MXFP4"],
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4",
        PRESET_SCHEMES["NVFP4"],
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
}
SHAPE = (40, 96)  # 40 rows are no whole number of blocks of 16


def random_weight(scheme: QuantizationScheme, seed: int = 0, peak: float = 27.3) -> QuantizedTensor:
    """Returns a weight of random finite codes of both signs of zero, its scales as the scheme stores them."""
    generator = torch.Generator().manual_seed(seed)
    element = ELEMENTS[scheme.data_type, scheme.bits]
    codes = torch.randint(0, 2**element.bits, SHAPE, generator=generator).to(torch.uint8)
    codes = torch.where(element.decode(codes).isfinite(), codes, 1)
    groups = group_count(SHAPE[1], scheme.group_size)
    scale = torch.rand(SHAPE[0], groups, generator=generator) + 0.01
    if scheme.group_size == 0:
        scale = scale[:1].expand(SHAPE[0], groups).contiguous()
    elif isinstance(scheme.group_size, tuple):
        rows = scheme.group_size[0]
        scale = scale[::rows].repeat_interleave(rows, dim=0)[: SHAPE[0]].contiguous()
    whole = None
    if scheme.data_type == "nv_fp":
        scale, whole = E4M3.round(scale * 400), torch.tensor(3.7)
    elif scheme.data_type == "mx_fp":
        scale = 2.0 ** torch.randint(-126, 128, scale.shape, generator=generator).float()
    else:
        scale = scale.to(getattr(torch, scheme.scale_dtype)).float()
    calibrated = scheme.activation is not None and scheme.activation.needs_calibration
    range_ = torch.tensor(peak) if calibrated else None
    return QuantizedTensor(codes, scale, None, scheme, global_scale=whole, input_peak=range_)


@pytest.mark.parametrize("case", CASES)
def test_unpacking_gives_what_was_packed(case):
    name, scheme, _, _ = CASES[case]
    weight, layout = random_weight(scheme), LAYOUTS[name]
    assert layout.refuses(scheme, SHAPE) is None
    tensors = layout.pack(weight)
    back = layout.unpack(tensors, scheme, SHAPE)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.dequantize(), weight.dequantize())
    again = layout.pack(back)
    assert set(again) == set(tensors)
    for part, tensor in tensors.items():  # activation ranges too, though 448 * 6 / peak is rounded
        assert torch.equal(again[part].view(torch.uint8), tensor.view(torch.uint8)), part
    found = {part: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for part, t in tensors.items()}
    assert found == layout.specs(scheme, SHAPE)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_decompresses_the_same_weights(case):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization import QuantizationScheme as TheirScheme

    name, scheme, compression, args = CASES[case]
    weight = random_weight(scheme)
    if scheme.data_type == "mx_fp":  # it computes in bfloat16, whose smallest products would be rounded to zero
        weight = QuantizedTensor(weight.codes, weight.scale.clamp(2.0**-100, 2.0**100), None, scheme)
    tensors = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in LAYOUTS[name].pack(weight).items()}
    theirs = TheirScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    dense = BaseCompressor.get_value_from_registry(compression).decompress(tensors, theirs)["weight"]
    # FP4 and MX come back in bfloat16: exact for MX, rounded once for NVFP4.
    assert torch.equal(dense, weight.dequantize(dense.dtype))


def test_the_even_input_of_a_pair_is_in_the_low_half():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([1, 7, 8, 15], dtype=torch.uint8)  # 0.5, 6, -0, -6
    weight = QuantizedTensor(codes, torch.tensor([[0.25]]), None, PRESET_SCHEMES["MXFP4A16"])
    tensors = LAYOUTS["mxfp4"].pack(weight)
    assert tensors["weight_packed"][0, :2].tolist() == [0x71, 0xF8]
    assert tensors["weight_scale"].tolist() == [[125]]  # 2**-2
    assert weight.dequantize()[0, :4].tolist() == [0.125, 1.5, -0.0, -1.5]


def test_calibrated_activation_ranges_by_hand():
    # NVFP4: 448 * 6 / peak; FP8: peak / 448 in the scale's precision.
    nvfp4 = random_weight(PRESET_SCHEMES["NVFP4"], peak=32.0)
    assert LAYOUTS["nvfp4"].pack(nvfp4)["input_global_scale"].tolist() == [84.0]
    static = random_weight(PRESET_SCHEMES["FP8_STATIC"], peak=28.0)
    stored = LAYOUTS["fp8"].pack(static)["input_scale"]
    assert (stored.tolist(), stored.dtype) == ([0.0625], torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "preset", "shape", "reason"),
    [
        ("fp8", "W4A16", (8, 128), "data_type=int"),
        ("mxfp4", "MXFP8", (8, 32), "data_type=mx_fp bits=8"),
        ("mxfp8", "MXFP4", (8, 32), "data_type=mx_fp bits=4"),
        ("mxfp4", "MXFP4", (8, 48), "groups of 32 in 48 inputs"),
        ("nvfp4", "MXFP4", (8, 32), "data_type=mx_fp"),
        ("nvfp4", "NVFP4", (8, 40), "groups of 16 in 40 inputs"),
    ],
)
def test_what_a_layout_cannot_hold_is_said(layout, preset, shape, reason):
    assert reason in LAYOUTS[layout].refuses(PRESET_SCHEMES[preset], shape)


def test_fp8_has_no_groups_within_a_row():
    assert "group_size=32" in LAYOUTS["fp8"].refuses(FP8.replace(group_size=32), (8, 64))


def test_nvfp4_bytes_are_those_of_the_reference(shared):
    (folder,) = (shared / "golden" / "llmc_nvfp4").iterdir()
    scheme, layout = PRESET_SCHEMES["NVFP4"], LAYOUTS["nvfp4"]
    table = E2M1.decode(torch.arange(16).to(torch.uint8))
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        stored = {key: handle.get_tensor(key) for key in handle.keys()}
    with safe_open(shared / "golden" / "tiny-llama" / "model.safetensors", framework="pt") as handle:
        original = {key: handle.get_tensor(key) for key in handle.keys()}
    layers = [key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")]
    assert len(layers) == 28
    for layer in layers:
        mine = {key.rpartition(".")[2]: t for key, t in stored.items() if key.startswith(layer + ".")}
        packed = mine["weight_packed"]
        codes = torch.stack([packed % 16, packed // 16], dim=-1).flatten(1)
        whole, peak = mine["weight_global_scale"], 2688 / mine["input_global_scale"].double()
        weight = QuantizedTensor(
            codes, mine["weight_scale"].float(), None, scheme, global_scale=whole[0], input_peak=peak[0]
        )
        tensors = layout.pack(weight)
        assert set(tensors) == set(mine)
        for part, tensor in tensors.items():
            assert tensor.dtype == mine[part].dtype
            assert torch.equal(tensor.view(torch.uint8), mine[part].view(torch.uint8)), part
        step = (mine["weight_scale"].float() / whole).repeat_interleave(16, dim=1)
        assert torch.equal(weight.dequantize(), step * table[codes.long()])
        error = (weight.dequantize() - original[f"{layer}.weight"].float()).abs() / step
        # Numbers of FP4 are 0.5 to 2 scales apart; pairs in the wrong order leave a mean of 2.5.
        assert error.mean() < 0.5, layer
