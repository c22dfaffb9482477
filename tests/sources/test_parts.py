from __future__ import annotations

import pytest

from auto_round.sources.parts import is_range, packed_weights

UP, EXPERTS = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts"
# What lies together in the checkpoints of a tool, by local name.
FORMS = {
    "GPTQ": {name: f"{UP}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")},
    "AWQ": {name: f"{UP}.{name}" for name in ("qweight", "qzeros", "scales")},
    "FP8": {"weight": f"{UP}.weight", "weight_scale_inv": f"{UP}.weight_scale_inv"},
    "pack-quantized": {
        f"weight{end}": f"{UP}.weight{end}" for end in ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    },
    "NVFP4": {f"weight{end}": f"{UP}.weight{end}" for end in ("_packed", "_scale", "_global_scale")},
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_weight_are_found(form):
    others = {f"{UP}.bias", "model.norm.weight", f"{UP}.input_scale", "model.layers.0.self_attn.k_scale"}
    (weight,) = packed_weights({*FORMS[form].values(), *others}).values()
    assert weight.key == f"{UP}.weight"
    assert weight.parts == FORMS[form]


def test_fused_experts_have_scales_by_their_own_name():
    keys = {f"{EXPERTS}.{name}" for name in ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias")}
    keys |= {f"{EXPERTS}.down_proj", f"{EXPERTS}.down_proj_scale"}
    found = packed_weights(keys)
    assert found.keys() == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert found[f"{EXPERTS}.down_proj"].parts.keys() == {"weight", "weight_scale"}


def test_a_checkpoint_in_16_bits_has_none():
    assert packed_weights({f"{UP}.weight", f"{UP}.bias", "model.logit_scale", "model.vision.scales"}) == {}


def test_ranges_are_known_by_their_names():
    assert is_range(f"{UP}.input_scale")
    assert is_range("model.layers.0.self_attn.k_scale")
    assert not is_range(f"{UP}.weight_scale")
    assert not is_range("model.logit_scale")
