"""Structures of small Transformers models on the meta device, against what their modelling code says."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.models.base import FAMILIES, LinearInfo, ModelFamily, discover, has_tied_head, head_name, is_linear

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def on_meta(config: transformers.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def leaves(structure, block: int) -> dict[str, tuple[int, int]]:
    """Returns the last two parts of a layer's name -> shape, for the layers of one block."""
    return {
        ".".join(linear.name.split(".")[-2:]): linear.shape for linear in structure.linears if linear.block == block
    }


LLAMA_BLOCK = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


def test_llama_has_seven_linear_layers_in_each_block():
    structure = discover(on_meta(transformers.LlamaConfig(**SMALL)))
    assert structure.block_lists == ("model.layers",)
    assert structure.blocks == ("model.layers.0", "model.layers.1")
    assert leaves(structure, 0) == leaves(structure, 1) == LLAMA_BLOCK
    assert structure.linears[-1] == LinearInfo("lm_head", (64, 32), False, None)
    assert structure.head == "lm_head"
    assert not structure.tied_head
    assert structure.other_weights == {"model.embed_tokens.weight": "embedding or other weight outside the blocks"}


def test_qwen3_heads_may_be_wider_than_the_hidden_size():
    structure = discover(on_meta(transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)))
    expected = {
        **LLAMA_BLOCK,
        "self_attn.q_proj": (64, 32),
        "self_attn.k_proj": (32, 32),
        "self_attn.v_proj": (32, 32),
        "self_attn.o_proj": (32, 64),
    }
    assert leaves(structure, 1) == expected
    assert structure.tied_head


def test_opt_keeps_its_blocks_below_the_decoder():
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32
    )
    structure = discover(on_meta(config))
    assert structure.blocks == ("model.decoder.layers.0", "model.decoder.layers.1")
    assert leaves(structure, 0) == {
        "self_attn.k_proj": (32, 32),
        "self_attn.v_proj": (32, 32),
        "self_attn.q_proj": (32, 32),
        "self_attn.out_proj": (32, 32),
        "0.fc1": (48, 32),
        "0.fc2": (32, 48),
    }
    assert structure.tied_head
    assert set(structure.other_weights) == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    }


def test_gpt2_stores_its_linear_layers_transposed():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
    structure = discover(on_meta(config))
    assert structure.blocks == ("transformer.h.0", "transformer.h.1")
    assert leaves(structure, 1) == {
        "attn.c_attn": (96, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }
    assert all(linear.transposed == (linear.block is not None) for linear in structure.linears)
    assert structure.head == "lm_head"
    assert structure.tied_head


def test_fused_experts_are_named_with_the_reason_they_stay():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    structure = discover(on_meta(config))
    attention = {name: shape for name, shape in LLAMA_BLOCK.items() if name.startswith("self_attn")}
    assert attention.items() <= leaves(structure, 0).items()
    assert not any("experts" in name for name in leaves(structure, 0))
    experts = [name for name in structure.other_weights if ".experts." in name]
    assert len(experts) == 4
    assert {structure.other_weights[name] for name in experts} == {
        "experts fused in a way that is not known are kept in 16 bits"
    }


def test_every_weight_with_two_dimensions_is_a_linear_layer_or_has_a_reason():
    configs = [
        transformers.LlamaConfig(**SMALL),
        transformers.MixtralConfig(**SMALL, num_local_experts=4),
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16),
    ]
    for config in configs:
        model = on_meta(config)
        structure = discover(model)
        told = {linear.parameter for linear in structure.linears} | set(structure.other_weights)
        assert {name for name, parameter in model.named_parameters() if parameter.ndim > 1} <= told


def test_a_model_without_config_is_found_by_structure():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(4, 4, bias=False)])
            self.norm = nn.LayerNorm(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(4)])
            self.small = nn.ModuleList([nn.Linear(2, 2)])
            self.layers = nn.ModuleList([Block(), Block()])
            self.proj = nn.Linear(4, 3)

    structure = discover(Model())
    assert structure.block_lists == ("layers",)
    assert [(linear.name, linear.block) for linear in structure.linears] == [
        ("small.0", None),
        ("layers.0.inner.0", 0),
        ("layers.1.inner.0", 1),
        ("proj", None),
    ]
    assert structure.head is None
    assert not structure.tied_head


def test_the_number_of_a_block_does_not_match_a_longer_number():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
    structure = discover(model)
    assert [linear.block for linear in structure.linears] == list(range(12))


def test_given_block_lists_are_taken_instead():
    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.large = nn.ModuleList([nn.Linear(8, 8)])
    assert discover(model, ["small"]).blocks == ("small.0",)
    assert discover(model, ["small", "large"]).blocks == ("small.0", "large.0")


def test_a_wrong_block_list_names_those_there_are():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedError, match=r"'model\.layers' is no list of layers of Module\. Lists: layers"):
        discover(model, ["model.layers"])


def test_a_model_without_lists_is_refused_with_the_option_to_use():
    with pytest.raises(UnsupportedError, match="--to_quant_block_names"):
        discover(nn.Linear(2, 2))


def test_the_untied_head_of_a_config_is_not_tied():
    model = on_meta(transformers.LlamaConfig(**SMALL, tie_word_embeddings=False))
    assert head_name(model) == "lm_head"
    assert not has_tied_head(model)


def test_a_registered_family_overrides_the_search(monkeypatch):
    class Family(ModelFamily):
        def block_lists(self, model: nn.Module) -> list[str]:
            assert model.config.model_type == "test_family"
            return ["small"]

    model = nn.Module()
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    model.large = nn.ModuleList([nn.Linear(8, 8)])
    model.config = transformers.PretrainedConfig()
    model.config.model_type = "test_family"
    monkeypatch.setitem(FAMILIES._entries, "test_family", Family())
    assert discover(model).blocks == ("small.0",)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        pytest.param(nn.Linear(2, 2), True, id="linear"),
        pytest.param(transformers.pytorch_utils.Conv1D(2, 2), True, id="transposed"),
        pytest.param(nn.Conv1d(2, 2, 1), False, id="convolution"),
        pytest.param(nn.Embedding(2, 2), False, id="embedding"),
    ],
)
def test_linear_layers_are_told_from_others(module, expected):
    assert is_linear(module) is expected


def test_the_parameter_of_a_layer_is_its_weight():
    assert LinearInfo("a.b", (1, 2), False, None).parameter == "a.b.weight"
