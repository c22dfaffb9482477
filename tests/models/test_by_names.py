from __future__ import annotations

import pytest

from auto_round.conversion import unfuse
from auto_round.errors import UnsupportedError
from auto_round.models.base import ROUTER, discover
from auto_round.models.by_names import (
    UNKNOWN_EXPERTS,
    ModelFacts,
    discover_by_names,
    embedding_key,
    fused_experts_of,
)

FACTS = ModelFacts(block_count=2, vocab_size=96)
PLAIN = {
    "model.embed_tokens.weight": (96, 64),
    **{f"model.layers.{n}.{leaf}.weight": (64, 64) for n in (10, 2, 0, 1) for leaf in ("attn.q_proj", "mlp.up_proj")},
    **{f"model.layers.{n}.input_layernorm.weight": (64,) for n in (10, 2, 0, 1)},
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
}


def names(structure) -> set[str]:
    return {layer.name for layer in structure.linears if layer.block is not None}


def routers(structure) -> set[str]:
    """Returns the routers, which the code of models holds as linear layers or as parameters of a module."""
    others = {name.removesuffix(".weight") for name, why in structure.other_weights.items() if why == ROUTER}
    return others | {layer.name for layer in structure.linears if layer.kept}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "opt", "gpt2", "qwen2_moe", "mixtral", "deepseek_v3"])
def test_what_is_found_by_names_is_what_the_code_says(make_model, kind):
    """The names of a model in memory; checkpoints of some families have others, which the pipeline's tests cover."""
    model = unfuse(make_model(kind)).model
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    facts = ModelFacts.of(model.config.to_dict())
    found, expected = discover_by_names(shapes, facts), discover(model)
    assert found.blocks == expected.blocks
    assert (found.block_lists, found.head, found.tied_head) == (
        expected.block_lists, expected.head, expected.tied_head,
    )  # fmt: skip
    described = [{(e.name, e.shape, e.transposed, e.block) for e in s.linears if not e.kept} for s in (found, expected)]
    assert described[0] == described[1]
    kept = [routers(structure) for structure in (found, expected)]
    assert kept[0] == kept[1]


def test_blocks_are_in_the_order_of_their_numbers_and_no_more_than_the_model_has():
    structure = discover_by_names(PLAIN, ModelFacts(block_count=3, vocab_size=96))
    assert structure.blocks == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert structure.extra_modules == ("model.layers.10",)
    assert not any(name.startswith("model.layers.10.") for name in names(structure))
    unbounded = discover_by_names(PLAIN, ModelFacts())
    assert unbounded.blocks[-1] == "model.layers.10"


def test_the_decoder_is_the_list_beside_the_embedding_not_the_largest():
    tower = {f"visual.blocks.{n}.mlp.fc1.weight": (512, 512) for n in range(4)}
    structure = discover_by_names({**tower, **PLAIN}, FACTS)
    assert structure.block_lists == ("model.layers",)
    outside = {layer.name for layer in structure.linears if layer.block is None}
    assert outside == {"lm_head", *(f"visual.blocks.{n}.mlp.fc1" for n in range(4))}
    asked = discover_by_names({**tower, **PLAIN}, FACTS, ["visual.blocks"])
    assert asked.blocks == tuple(f"visual.blocks.{n}" for n in range(4))


def test_without_an_embedding_a_vision_tower_is_not_taken():
    tower = {f"vision_tower.layers.{n}.fc1.weight": (512, 512) for n in range(4)}
    decoder = {f"thinker.layers.{n}.fc1.weight": (32, 32) for n in range(2)}
    assert discover_by_names({**tower, **decoder}, ModelFacts()).block_lists == ("thinker.layers",)


def test_embeddings_norms_convolutions_and_biases_are_no_linear_layers():
    block = "model.layers.0"
    others = {
        f"{block}.attn.q_norm.weight": (4, 16),
        f"{block}.ln_1.weight": (8, 8),
        f"{block}.attn.relative_attention_bias.weight": (32, 4),
        f"{block}.embed_positions.weight": (64, 64),
        f"{block}.mixer.conv1d.weight": (64, 1, 4),
        f"{block}.mixer.A_log": (64, 16),
    }
    structure = discover_by_names({**PLAIN, **others, f"{block}.mixer.in_proj.weight": (48, 64)}, FACTS)
    assert names(structure) >= {f"{block}.mixer.in_proj", f"{block}.attn.q_proj"}
    assert not names(structure) & {key.removesuffix(".weight") for key in others}
    assert others.keys() <= structure.other_weights.keys()


def test_routers_stay_and_the_gate_of_an_expert_does_not():
    moe = {f"model.layers.0.mlp.experts.{n}.gate_proj.weight": (32, 64) for n in range(8)}
    moe |= {"model.layers.0.mlp.gate.weight": (8, 64), "model.layers.0.mlp.shared_expert_gate.weight": (1, 64)}
    moe |= {"model.layers.1.moe.router.layer.weight": (64, 64)}
    structure = discover_by_names({**PLAIN, **moe}, FACTS)
    routers = {"model.layers.0.mlp.gate.weight", "model.layers.1.moe.router.layer.weight"}
    assert {name for name, why in structure.other_weights.items() if why == ROUTER} == routers
    kept = {layer.name for layer in structure.linears if layer.kept}
    assert kept == {"model.layers.0.mlp.shared_expert_gate"}
    assert {f"model.layers.0.mlp.experts.{n}.gate_proj" for n in range(8)} <= names(structure)


def test_layers_for_several_tokens_are_extra():
    shapes = {**PLAIN, "mtp.fc.weight": (64, 64), "mtp.layers.0.attn.q_proj.weight": (64, 64)}
    structure = discover_by_names(shapes, ModelFacts(block_count=11, vocab_size=96))
    assert structure.extra_modules == ("mtp",)
    assert not any("mtp" in layer.name for layer in structure.linears)


def test_a_tied_output_layer_has_the_shape_of_the_embedding():
    shapes = {key: shape for key, shape in PLAIN.items() if key != "lm_head.weight"}
    tied = discover_by_names(shapes, ModelFacts(2, 96, tied_head=True))
    assert (tied.head, tied.tied_head) == ("lm_head", True)
    assert next(layer for layer in tied.linears if layer.name == "lm_head").shape == (96, 64)
    assert discover_by_names(shapes, FACTS).head is None


def test_weights_stored_the_other_way_round_are_told_by_their_biases():
    shapes = {"wte.weight": (96, 64), "h.0.attn.c_attn.weight": (64, 192), "h.0.attn.c_attn.bias": (192,)}
    shapes |= {"h.0.attn.c_proj.weight": (64, 64), "h.0.attn.c_proj.bias": (64,)}
    structure = discover_by_names(shapes, ModelFacts(vocab_size=96))
    assert {(layer.name, layer.shape, layer.transposed) for layer in structure.linears} == {
        ("h.0.attn.c_attn", (192, 64), True), ("h.0.attn.c_proj", (64, 64), True),
    }  # fmt: skip


def test_fused_experts_are_known_by_their_shapes():
    start = "model.layers.0.mlp.experts"
    plain = {f"{start}.gate_up_proj": (4, 64, 48), f"{start}.down_proj": (4, 48, 32)}
    (layout,) = fused_experts_of(plain, "novel").values()
    assert (layout.count, layout.gated, layout.transposed, layout.interleaved) == (4, True, False, False)
    turned = {f"{start}.gate_up_proj": (4, 48, 64), f"{start}.down_proj": (4, 32, 48)}
    assert fused_experts_of(turned, "novel") == {}  # gate and up may alternate or not
    assert fused_experts_of(turned, "gpt_oss")[start].interleaved
    assert not fused_experts_of(turned, "llama4")[start].interleaved
    assert fused_experts_of(plain, "qwen3_vl_moe") == {}
    structure = discover_by_names({**PLAIN, **turned, "model.layers.0.mlp.gate.weight": (4, 48)}, FACTS)
    reasons = structure.other_weights
    assert {reasons[key] for key in turned} == {UNKNOWN_EXPERTS}
    assert reasons["model.layers.0.mlp.gate.weight"] == ROUTER


def test_facts_come_from_the_language_part_of_a_config():
    nested = {"model_type": "vl", "text_config": {"num_hidden_layers": 3, "vocab_size": 9, "tie_word_embeddings": True}}
    assert ModelFacts.of(nested) == ModelFacts(3, 9, tied_head=True, model_type="vl")
    assert ModelFacts.of({**nested, "tie_word_embeddings": False}).tied_head is False
    assert ModelFacts.of({"n_layer": 4}) == ModelFacts(block_count=4)


def test_the_embedding_is_not_one_of_pictures_or_positions():
    shapes = {"model.embed_positions.weight": (2048, 64), "model.embed_tokens.weight": (96, 64)}
    shapes |= {"visual.pos_embed.weight": (4096, 64)}
    assert embedding_key(shapes, FACTS) == "model.embed_tokens.weight"
    assert embedding_key({}, FACTS) is None


def test_lists_that_are_not_there_are_told():
    with pytest.raises(UnsupportedError, match="'blocks' is no list of layers"):
        discover_by_names(PLAIN, FACTS, ["blocks"])
    with pytest.raises(UnsupportedError, match="no numbered layers"):
        discover_by_names({"model.embed_tokens.weight": (96, 64)}, FACTS)
