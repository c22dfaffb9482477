"""Which experts are unfused before loading, and what that leaves behind in Transformers: nothing."""

from __future__ import annotations

import pytest
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from auto_round.conversion import fuses_experts, model_conversions
from auto_round.inference.config import read_config
from auto_round.inference.experts import load_experts_by_name, unfuse_quantized_experts
from auto_round.models.experts import LinearExperts

BASE = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "packing_format": "auto_round:auto_gptq",
}


def unfused(model, **config) -> list[str]:
    values = {**BASE, "block_name_to_quantize": "model.layers", **config}
    return unfuse_quantized_experts(model, read_config(values), lambda name: name)


def test_quantized_experts_become_layers(make_model):
    model = make_model("qwen3_moe")
    assert unfused(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert isinstance(model.model.layers[1].mlp.experts, LinearExperts)


@pytest.mark.parametrize(
    ("kind", "names"), [("gpt_oss", [1]), ("qwen3_moe", [0, 1])], ids=["stored fused", "stored one by one"]
)
def test_experts_in_16_bits_stay_fused_only_where_they_are_stored_so(make_model, kind, names):
    extra = {r".*layers\.0\.mlp\.experts.*": {"bits": 16}}
    assert unfused(make_model(kind), extra_config=extra) == [f"model.layers.{index}.mlp.experts" for index in names]


def test_a_module_of_experts_that_is_listed_stays(make_model):
    names = {f"model.layers.{index}.mlp.experts": {"bits": 16} for index in (0, 1)}
    assert unfused(make_model("qwen3_moe"), extra_config=names) == []
    assert unfused(make_model("qwen3_moe"), modules_to_not_convert=["mlp.experts"]) == []


def test_the_conversions_are_left_out_once(make_model):
    model = make_model("mixtral")
    before = get_checkpoint_conversion_mapping("mixtral")
    load_experts_by_name(model)
    renamings, converters = model_conversions(model)
    assert renamings
    assert not [converter for converter in converters if fuses_experts(converter)]
    assert [type(entry) for entry in get_checkpoint_conversion_mapping("mixtral")] == [type(entry) for entry in before]
    assert [converter for converter in model_conversions(model)[1] if fuses_experts(converter)]


def test_views_of_the_fused_weights_are_kept_on_the_meta_device(make_model):
    model = make_model("qwen3_moe").to("meta")
    unfused(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
