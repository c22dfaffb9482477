"""Keys at the head of a file, against values written by hand."""

import math

import pytest

pytest.importorskip("gguf")

LLAMA = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "tiny",
    "general.file_type": 15,
    "general.quantization_version": 2,
    "llama.block_count": 3,
    "llama.context_length": 128,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 64,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": 320,
}
EXPECTED = {
    "llama": LLAMA,
    "mixtral": {"llama.expert_count": 4, "llama.expert_used_count": 2},
    "qwen2-yarn": {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    },
    "qwen2-moe": {
        "qwen2moe.expert_count": 4,
        "qwen2moe.expert_feed_forward_length": 256,
        "qwen2moe.expert_shared_feed_forward_length": 256,
    },
    "qwen3-moe": {"general.architecture": "qwen3moe", "qwen3moe.attention.key_length": 64},
    "gemma2": {
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.sliding_window": 8,
        "tokenizer.ggml.add_space_prefix": False,
    },
    "gemma3": {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 10000.0},
    "phi3-long": {
        "phi3.rope.dimension_count": 48,
        "phi3.rope.scaling.original_context_length": 512,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(512)),
    },
    "starcoder2": {"starcoder2.attention.layer_norm_epsilon": 1e-5},
    "granite": {
        "granite.attention.scale": 0.1,
        "granite.embedding_scale": 3.0,
        "granite.residual_scale": 0.5,
        "granite.logit_scale": 2.0,
    },
    "glm4": {"glm4.rope.dimension_count": 32},
    "deepseek-v3": {
        "general.architecture": "deepseek2",
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.key_length": 256 + 32,
        "deepseek2.attention.value_length": 256,
        "deepseek2.attention.key_length_mla": 96,
        "deepseek2.attention.value_length_mla": 64,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_weights_scale": 2.5,
    },
    "gpt-oss": {"gpt-oss.expert_feed_forward_length": 256, "gpt-oss.rope.scaling.type": "yarn"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_keys_have_the_values_of_the_config(export_gguf, family):
    found = export_gguf("q4_k_m", family).metadata()
    for key, value in EXPECTED[family].items():
        assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def test_experts_are_told_in_the_size(export_gguf):
    assert "4x" in export_gguf("q4_0", "mixtral").metadata()["general.size_label"]


def test_a_commit_of_the_hub_is_named_after_its_repository(tmp_path, export_gguf, save_model):
    snapshot = tmp_path / "models--org--Name-7B" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    save_model().rename(snapshot)
    exported = export_gguf("q4_0", folder=snapshot)
    assert exported.files[0].name.startswith("Name-7B-")
