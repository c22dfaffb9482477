from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.inference.config import read_config
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.sources.method import SourceMethod
from auto_round.sources.unpack import dense_shape, unpack
from auto_round.tensors import QuantizedTensor, group_count

KEY = "model.layers.0.mlp.up_proj.weight"
FP8 = SourceMethod("fp8")


def gptq(**changes) -> SourceMethod:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True, **changes}
    return SourceMethod("gptq", layers=read_config(config))


def random_weight(rows: int, width: int, scheme: QuantizationScheme) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows + width)
    groups = (rows, group_count(width, scheme.group_size))
    codes = torch.randint(0, 2**scheme.bits, (rows, width), generator=generator, dtype=torch.uint8)
    zero = torch.randint(1, 2**scheme.bits, groups, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(groups, generator=generator) + 0.1).half().float()
    return QuantizedTensor(codes, scale, None if scheme.sym else zero, scheme)


def random_fp8(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (8, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_blocks_are_what_transformers_takes_them_for(shape, dtype):
    """Blocks at the right and lower border are smaller; those of DeepSeek's kv_a_proj are."""
    weight = random_fp8(*shape)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)).to(dtype)
    found = unpack({"weight": weight, "weight_scale_inv": scale}, FP8, KEY).dequantize()
    assert torch.equal(found, _dequantize_fp8_weight(weight, scale.float(), [128, 128], torch.float32))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)], ids=str)
def test_fp8_has_one_scale_or_one_for_each_row(shape):
    weight, scale = random_fp8(24, 40), torch.rand(shape) + 0.5
    found = unpack({"weight": weight, "weight_scale": scale}, SourceMethod("fbgemm_fp8"), KEY).dequantize()
    assert torch.equal(found, weight.float() * scale.reshape(-1, 1))


def test_scales_of_no_known_shape_are_refused():
    with pytest.raises(CheckpointError, match=r"scales \[3, 2\] for 256 x 256.*would be \[2, 2\]"):
        unpack({"weight": random_fp8(256, 256), "weight_scale_inv": torch.ones(3, 2)}, FP8, KEY)


def test_a_float8_without_the_usual_range_is_refused():
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fnuz)
    with pytest.raises(UnsupportedError, match="float8_e4m3fnuz"):
        unpack({"weight": weight, "weight_scale": torch.ones(1)}, FP8, KEY)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_int8_may_have_groups_and_zero_points(groups, sym):
    weight = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    scale, zero = torch.rand(8, groups), torch.randint(-128, 128, (8, groups), dtype=torch.int8)
    tensors = {"weight": weight, "weight_scale": scale} | ({} if sym else {"weight_zero_point": zero})
    found = unpack(tensors, SourceMethod("compressed-tensors"), KEY).dequantize()
    levels = weight.float().unflatten(1, (groups, -1)) - (0 if sym else zero.float()[..., None])
    assert torch.equal(found, (levels * scale[..., None]).flatten(1))


def test_mxint4_is_told_from_mxfp4_by_the_config():
    scheme = QuantizationScheme.from_dict({"data_type": "mx_int", "bits": 4})
    codes = torch.arange(64, dtype=torch.uint8).reshape(1, 64) % 16
    codes[codes == 8] = 7  # -8 has no form with sign and magnitude
    weight = QuantizedTensor(codes, torch.tensor([[0.5, 2.0]]), None, scheme)
    config = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_int", "packing_format": "auto_round"}
    method = SourceMethod("auto-round", layers=read_config({**config, "group_size": 32}))
    found = unpack(LAYOUTS["mxint4"].pack(weight), method, KEY)
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_inputs_may_name_their_groups(bits, sym):
    """`desc_act`: input i is in group g_idx[i]."""
    weight = random_weight(32, 64, QuantizationScheme(bits=bits, group_size=16, sym=sym))
    index = torch.arange(64).flip(0) // 16
    tensors = LAYOUTS["gptq"].pack(weight) | {"g_idx": index.int()}
    found = unpack(tensors, gptq(bits=bits, group_size=16, sym=sym), KEY).dequantize()
    assert torch.equal(found, (weight.codes - weight.zero_points()[:, index].float()) * weight.scale[:, index])


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_widths_and_groups_are_told_by_the_tensors_where_the_config_is_wrong(bits, group_size):
    weight = random_weight(32, 64, QuantizationScheme(bits=bits, group_size=group_size, sym=False))
    found = unpack(LAYOUTS["gptq"].pack(weight), gptq(), KEY)
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_a_config_that_fits_is_taken_by_its_word():
    """A shorter last group cannot be told from longer groups by the number of scales."""
    weight = random_weight(32, 96, QuantizationScheme(bits=4, group_size=40, sym=False))
    tensors = LAYOUTS["gptq"].pack(weight)
    assert torch.equal(unpack(tensors, gptq(group_size=40), KEY).dequantize(), weight.dequantize())


def test_integers_that_do_not_fit_their_scales_are_refused():
    tensors = LAYOUTS["gptq"].pack(random_weight(32, 64, QuantizationScheme(group_size=16, sym=False)))
    with pytest.raises(CheckpointError, match="zero points of 32 rows"):
        unpack({**tensors, "qzeros": torch.zeros(4, 50, dtype=torch.int32)}, gptq(), KEY)
    few = {**tensors, "qweight": tensors["qweight"][:1], "scales": torch.ones(7, 32)}
    with pytest.raises(CheckpointError, match="7 groups do not fit 8 inputs"):
        unpack(few, gptq(), KEY)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_inputs_may_name_their_groups(bits, sym):
    scheme = QuantizationScheme(bits=bits, group_size=16, sym=sym)
    weight = random_weight(24, 64, scheme)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16
    tensors = LAYOUTS["ct_packed"].pack(weight) | {"weight_g_idx": index}
    found = unpack(tensors, SourceMethod("compressed-tensors"), KEY).dequantize()
    assert torch.equal(found, (weight.codes - weight.zero_points()[:, index].float()) * weight.scale[:, index])
    unused = tensors | {"weight_g_idx": torch.full((64,), -1)}
    assert torch.equal(unpack(unused, SourceMethod("compressed-tensors"), KEY).dequantize(), weight.dequantize())


def test_unpacked_zero_points_of_packed_weights_are_refused():
    tensors = LAYOUTS["ct_packed"].pack(random_weight(24, 64, QuantizationScheme(group_size=16, sym=False)))
    with pytest.raises(UnsupportedError, match=r"zero points of dtype torch\.int8"):
        unpack({**tensors, "weight_zero_point": torch.zeros(24, 4, dtype=torch.int8)}, SourceMethod("x"), KEY)


def test_the_shape_of_blocks_is_that_of_the_weight():
    blocks = {"weight_blocks": torch.zeros(3, 64, 2, 16, dtype=torch.uint8, device="meta")}
    assert dense_shape(blocks, SourceMethod("mxfp4"), KEY) == (3, 64, 64)
