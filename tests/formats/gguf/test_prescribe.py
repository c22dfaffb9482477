"""What a mixture and a layer_config make of each weight, and which options contradict it."""

from pathlib import Path

import pytest

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.recipes import recipe_options

from .conftest import planned, schemes

pytest.importorskip("gguf")


def test_the_plan_follows_the_mixture(save_model):
    plan = planned(save_model(num_hidden_layers=3))
    found = schemes(plan)
    assert [found[f"model.layers.{n}.mlp.down_proj"][:7] for n in range(3)] == ["int_dq4", "int_dq4", "int_dq6"]
    assert found["lm_head"].startswith("int_dq6")
    assert found["model.embed_tokens"].startswith("int_dq4")
    assert plan.prescribed_by == "gguf:q4_k_m"


def test_a_tied_output_layer_is_the_embedding(save_model):
    found = schemes(planned(save_model("llama-tied")))
    assert found["lm_head"] == "16-bit"
    assert found["model.embed_tokens"].startswith("int_dq6")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"group_size": 128},
        {"sym": True},
        {"scheme": "W4A16"},
        {"act_bits": 8},
        {"data_type": "mx_fp4"},
        {"static_kv_dtype": "fp8"},
    ],
    ids=str,
)
def test_options_that_contradict_the_format_are_refused(save_model, options):
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}=.*gguf:q4_k_m"):
        planned(save_model(), **options)


@pytest.mark.parametrize("options", [{"bits": 4}, {"scheme": "gguf:q4_k_m"}, {"scheme": "GGUF:Q4_K"}], ids=str)
def test_options_that_say_the_same_are_taken(save_model, options):
    folder = save_model()
    assert schemes(planned(folder, **options)) == schemes(planned(folder))


def test_layer_config_wins(save_model):
    config = {"down_proj": "gguf:q8_0", "layers.0.self_attn": 5, "lm_head": 16, "embed_tokens": "gguf:q3_k"}
    found = schemes(planned(save_model(), layer_config=config, fp_layers="layers.2.mlp.up_proj"))
    assert found["model.layers.1.mlp.down_proj"] == "int8 g32 sym"
    assert found["model.layers.0.self_attn.v_proj"].startswith("int_dq5")
    assert found["model.embed_tokens"].startswith("int_dq3")
    assert found["lm_head"] == found["model.layers.2.mlp.up_proj"] == "16-bit"


def test_plain_mixtures_give_plain_blocks_for_a_number_of_bits(save_model):
    found = schemes(planned(save_model(), "gguf:q4_1", layer_config={"up_proj": 5}))
    assert found["model.layers.0.mlp.up_proj"].startswith("int_float_zp5")


@pytest.mark.parametrize(
    ("family", "config", "text"),
    [
        ("llama-tied", {"lm_head": 8}, "shares the embedding's tensor"),
        ("llama", {"down_proj": 7}, "no type of 7 bits"),
        ("llama", {"down_proj": {"bits": 4, "group_size": 64}}, "GGUF has no block type"),
        ("llama", {"nothing": 4}, "matches no linear layer"),
        ("deepseek-v3", {"kv_b_proj": 4}, "rearranged"),
        ("qwen2-moe", {"shared_expert_gate": 8}, "keeps it in float32"),
    ],
)
def test_layer_configs_that_cannot_be_are_refused(save_model, family, config, text):
    with pytest.raises((ConfigError, UnsupportedError), match=text):
        planned(save_model(family), layer_config=config)


@pytest.mark.parametrize(("recipe", "family"), [("qwen3-moe", "qwen3-moe"), ("deepseek-r1", "deepseek-v3")])
def test_the_mixed_recipes_of_the_repository_keep_what_is_no_expert_wider(recipe, family, save_model):
    file = Path(__file__).resolve().parents[3] / "recipes" / f"{recipe}-q2ks-mixed.json"
    options = recipe_options(file)
    found = schemes(planned(save_model(family), options.pop("format"), **options))
    assert found["model.layers.2.self_attn.o_proj"].startswith("int_dq4")
    assert found["lm_head"] == found["model.embed_tokens"] == "int8 g32 sym"
    assert found["model.layers.2.mlp.experts.0.up_proj"].startswith("int_dq2")
