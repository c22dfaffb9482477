"""Whole checkpoints as tools of others write them: gpt-oss with MXFP4 blocks, DeepSeek with FP8 blocks, fused FP8."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from auto_round.sources.dequantized import DequantizedTensors
from auto_round.sources.method import SourceMethod
from auto_round.stored_tensors import NamedTensors

EXPERTS = "model.layers.0.mlp.experts"


class InMemory(dict, NamedTensors):
    """Tensors of a checkpoint that was never written."""


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def test_blocks_of_fused_experts_are_what_transformers_takes_them_for():
    blocks, exponents = random_bytes(3, 64, 2, 16), random_bytes(3, 64, 2) % 32 + 112
    bias = torch.ones(3, 64)
    stored = InMemory(
        {
            f"{EXPERTS}.gate_up_proj_blocks": blocks,
            f"{EXPERTS}.gate_up_proj_scales": exponents,
            f"{EXPERTS}.gate_up_proj_bias": bias,
        }
    )
    tensors = DequantizedTensors(stored, SourceMethod("mxfp4"), torch.bfloat16)
    assert list(tensors) == [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_bias"]
    found = tensors[f"{EXPERTS}.gate_up_proj"]
    assert torch.equal(found, convert_moe_packed_tensors(blocks, exponents, dtype=torch.bfloat16))
    outline = tensors.outline(f"{EXPERTS}.gate_up_proj")
    assert (outline.shape, outline.dtype, outline.is_meta) == (found.shape, found.dtype, True)
    assert tensors[f"{EXPERTS}.gate_up_proj_bias"] is bias


def test_a_fused_tensor_is_kept_until_another_weight_is_read():
    """Else it would be dequantized anew for each of its experts."""
    names = [f"{EXPERTS}.{name}" for name in ("gate_up_proj", "down_proj")]
    stored = InMemory({f"{name}_blocks": random_bytes(2, 8, 1, 16) for name in names})
    stored.update({f"{name}_scales": random_bytes(2, 8, 1) for name in names})
    tensors = DequantizedTensors(stored, SourceMethod("mxfp4"), torch.bfloat16)
    first = tensors[names[0]]
    assert tensors[names[0]] is first
    tensors[names[1]]
    assert tensors[names[0]] is not first
    assert torch.equal(tensors[names[0]].view(torch.int16), first.view(torch.int16))


def test_fused_experts_in_float8_have_blocks_or_columns():
    weight = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    blocks, columns, single = torch.rand(2, 1, 2), torch.rand(2, 1, 256), torch.rand(2)
    stored = InMemory(
        {
            "a.experts.down_proj": weight,
            "a.experts.down_proj_scale_inv": blocks,
            "b.experts.down_proj": weight,
            "b.experts.down_proj_scale": columns,
            "c.experts.down_proj": weight,
            "c.experts.down_proj_scale": single,
        }
    )
    tensors = DequantizedTensors(stored, SourceMethod("fp8"), torch.float32)
    assert torch.equal(tensors["a.experts.down_proj"], weight.float() * blocks.repeat_interleave(128, -1))
    assert torch.equal(tensors["b.experts.down_proj"], weight.float() * columns)
    assert torch.equal(tensors["c.experts.down_proj"], weight.float() * single.view(2, 1, 1))


def test_tensors_that_are_not_quantized_are_as_they_are_stored():
    stored = InMemory({"model.norm.weight": torch.ones(4), "a.weight": torch.ones(4, 4)})
    tensors = DequantizedTensors(stored, SourceMethod("fp8"), torch.bfloat16)
    assert dict(tensors) == stored
    assert len(tensors) == 2
    assert "a.weight" in tensors
    assert "a.weight_scale" not in tensors


@pytest.mark.parametrize("stored_as", ["layers.0.attn.c_attn", "transformer.layers.0.attn.c_attn"])
def test_weights_that_the_model_holds_transposed_are_turned(stored_as):
    """GPT-2's checkpoints leave out the beginning of names."""
    weight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    stored = InMemory({f"{stored_as}.weight": weight, f"{stored_as}.weight_scale": torch.ones(1)})
    names = ["transformer.layers.0.attn.c_attn"]
    tensors = DequantizedTensors(stored, SourceMethod("fp8"), torch.float32, names)
    assert torch.equal(tensors[f"{stored_as}.weight"], weight.float().t())
    assert tensors.outline(f"{stored_as}.weight").shape == (8, 4)
