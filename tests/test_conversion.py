"""Names of experts in checkpoints and in models, by Transformers' own tables."""

from __future__ import annotations

import pytest
import torch
from transformers.core_model_loading import Transpose

from auto_round import conversion
from auto_round.conversion import expert_leaves, fuses_experts, map_keys, model_conversions, unfuse


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [
        ("mixtral", ("w1", "w3", "w2")),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
        ("gpt_oss", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_projections_are_named_as_the_conversion_names_them(make_model, kind, leaves):
    assert expert_leaves(make_model(kind)) == leaves


def test_a_model_without_experts_is_itself(make_model):
    model = make_model("llama")
    unfused = unfuse(model)
    assert unfused.model is model
    assert not unfused.slices()
    plain = torch.nn.Linear(2, 2)
    assert unfuse(plain).model is plain
    assert model_conversions(plain) == ([], [])


def test_experts_that_a_conversion_changes_stay_fused(make_model, monkeypatch):
    """Slices of what is stored would not be the experts' weights then."""
    model = make_model("qwen3_moe")
    renamings, converters = model_conversions(model)
    converters[0].operations = [Transpose(1, 2)]
    monkeypatch.setattr(conversion, "model_conversions", lambda _model: (renamings, converters))
    assert unfuse(model).model is model


def test_a_fused_key_is_named_by_slices_below_its_own_name(make_model):
    unfused = unfuse(make_model("granitemoe"))
    keys = [
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
    ]
    found = map_keys([*keys, "model.rotary.inv_freq"], unfused)
    stem = "model.layers.0.block_sparse_moe"
    assert found.names[keys[1]] == f"{stem}.router.weight"
    assert found.names["model.rotary.inv_freq"] is None
    assert list(found.fused) == keys[:1]
    slices = [f"{stem}.experts.{index}.{leaf}.weight" for index in range(4) for leaf in ("gate_proj", "up_proj")]
    assert list(found.fused[keys[0]].parts) == slices
    assert found.fused[keys[0]].parameters == {name: name for name in slices}


def test_only_conversions_into_experts_fuse_them(make_model):
    converters = model_conversions(make_model("mixtral"))[1]
    targets = {converter.target_patterns[0]: fuses_experts(converter) for converter in converters}
    assert targets[".experts.gate_up_proj"]
    assert targets[".experts.down_proj"]
