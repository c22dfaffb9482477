"""Names and fused tensors that a format writes."""

from __future__ import annotations

import torch

from auto_round.checkpoint import ModuleSource
from auto_round.config import SchemeConfig
from auto_round.formats import EXPORTERS
from auto_round.formats.packing import Joints, Packing, in_stored_names
from auto_round.models import discover
from auto_round.plan import resolve


def plan_of(source: ModuleSource):
    return resolve(discover(source.model), SchemeConfig(bits=4, group_size=32))


def test_layers_and_routers_get_the_names_of_the_checkpoint(make_model):
    source = ModuleSource(make_model("mixtral"))
    plan = in_stored_names(plan_of(source), source.keys())
    names = [entry.layer.name for entry in plan.entries]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in plan.structure.other_weights
    assert plan.structure.blocks == ("model.layers.0", "model.layers.1")


def test_a_plan_whose_names_are_those_of_the_checkpoint_stays(make_model):
    source = ModuleSource(make_model("llama"))
    plan = plan_of(source)
    assert in_stored_names(plan, source.keys()) is plan


def test_slices_are_joined_where_none_is_packed(make_model):
    source = ModuleSource(make_model("gpt_oss"))
    assert not Joints(source, Packing.of(EXPORTERS["auto_round"], plan_of(source))).keys
    joints = Joints(source, Packing.of(EXPORTERS["fake"], plan_of(source)))
    fused = "model.layers.0.mlp.experts.down_proj"
    parts = source.fused()[fused]
    written = [joints.joined({key: source.read(key)}) for key in parts]
    assert written[:-1] == [{}] * (len(parts) - 1)
    assert torch.equal(written[-1][fused], source.original.get_parameter(fused))
