"""FP8 weights against values worked by hand, torch's casts and compressed_tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import MIN_SCALE
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

FP8 = DATA_TYPES["fp"]
# id -> group size, and compressed_tensors' arguments for it
GROUPS = {
    "row": (-1, {"strategy": "channel"}),
    "tensor": (0, {"strategy": "tensor"}),
    "block": ((8, 16), {"strategy": "block", "block_structure": [8, 16]}),
}


def scheme_of(group_size, scale_dtype: str = "float32") -> QuantizationScheme:
    return QuantizationScheme(data_type="fp", bits=8, group_size=group_size, scale_dtype=scale_dtype)


def random_weight(rows: int = 20, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.logspace(-2, 0, rows)[:, None]


def rounded(weight, scheme, data_type=FP8):
    range_ = data_type.minmax_range(weight, scheme)
    return data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))


def test_by_hand():
    # Peak 448: scale 1. 1.05 lies between 1 and 1.125, 300 between 288 and 320; 17 is a tie of 16 and 18.
    encoded = rounded(torch.tensor([[448.0, 1.05, -300.0, 17.0, 2.0**-10]]), scheme_of(-1))
    assert encoded.scale.tolist() == [[1.0]]
    assert encoded.dequantize().tolist() == [[448.0, 1.0, -288.0, 16.0, 0.0]]
    assert encoded.codes[0, :2].tolist() == [0x7E, 0x38]


@pytest.mark.parametrize("case", GROUPS)
def test_plain_rounding_is_what_compressed_tensors_computes(case):
    group_size, args = GROUPS[case]
    weight, scheme = random_weight(), scheme_of(group_size)
    encoded = rounded(weight, scheme)
    scale = {"row": encoded.scale, "tensor": encoded.scale[:1, 0], "block": encoded.scale[::8]}[case]
    peaks = {
        "row": weight.abs().amax(1, keepdim=True),
        "tensor": weight.abs().amax().reshape(1),
        "block": torch.nn.functional.pad(weight, (0, 0, 0, 4)).abs().reshape(3, 8, 3, 16).amax((1, 3)),
    }[case]
    assert torch.equal(scale, peaks / 448)
    expected = fake_quantize(weight, scale, torch.zeros_like(scale), QuantizationArgs(num_bits=8, type="float", **args))
    assert torch.equal(encoded.dequantize(), expected)
    assert torch.equal(encoded.codes.view(torch.float8_e4m3fn).float(), encoded.levels())


def test_e5m2_rounds_as_torch_casts():
    weight, scheme = random_weight(), QuantizationScheme.from_dict({"data_type": "fp8_e5m2", "scale_dtype": "float32"})
    encoded = rounded(weight, scheme, DATA_TYPES["fp_e5m2"])
    assert torch.equal(encoded.scale, weight.abs().amax(1, keepdim=True) / 57344)
    cast = (weight / encoded.scale).to(torch.float8_e5m2)
    assert torch.equal(encoded.codes, cast.view(torch.uint8))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_scales_are_numbers_of_their_dtype(scale_dtype):
    weight = random_weight() * 1e-3
    weight[3] = 0
    scheme = scheme_of(-1, scale_dtype)
    scale = FP8.minmax_range(weight, scheme)["scale"]
    assert torch.equal(scale.to(getattr(torch, scale_dtype)).float(), scale)
    assert scale[3] == MIN_SCALE[scale_dtype]
    assert not rounded(weight, scheme).dequantize()[3].any()


@pytest.mark.parametrize("group_size", [group_size for group_size, _ in GROUPS.values()], ids=GROUPS)
def test_the_search_is_never_worse_than_the_peak(group_size):
    weight, scheme = random_weight(seed=3), scheme_of(group_size, "bfloat16")
    importance = torch.rand(48, generator=torch.Generator().manual_seed(4)) ** 4

    def error(range_):
        dense = FP8.fake_quantize(weight, scheme, range_, FP8.trainable(weight, scheme))
        return (importance * (dense - weight).square()).sum(1)

    plain, searched = error(FP8.minmax_range(weight, scheme)), error(FP8.search_range(weight, scheme, importance))
    if group_size == -1:
        assert (searched <= plain).all()
    assert searched.sum() < plain.sum()


def test_rows_of_a_block_keep_one_scale_while_clip_factors_move():
    weight, scheme = random_weight(), scheme_of((8, 16))
    params = FP8.trainable(weight, scheme)
    params["max_scale"] = torch.linspace(0.7, 1.2, params["max_scale"].numel()).reshape(params["max_scale"].shape)
    encoded = FP8.encode(weight, scheme, FP8.minmax_range(weight, scheme), params)
    assert torch.equal(encoded.scale[::8].repeat_interleave(8, dim=0)[:20], encoded.scale)
    assert encoded.scale[::8].unique().numel() == 9


def test_refusals_and_scale_bits():
    assert FP8.refuses(PRESET_SCHEMES["FP8_BLOCK"]) is None
    assert "bits=4" in FP8.refuses(scheme_of(-1).replace(bits=4))
    assert "sym=False" in FP8.refuses(scheme_of(-1).replace(sym=False))
    assert (FP8.scale_bits(scheme_of(-1)), FP8.scale_bits(scheme_of(-1, "bfloat16"))) == (32, 16)
