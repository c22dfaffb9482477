"""DeepSeek V2 and V3: latent attention, whose up-projection llama.cpp wants as two tensors, and routed experts."""

from __future__ import annotations

import functools

from torch import Tensor

from auto_round.formats.gguf.families.base import (
    GGUF_FAMILIES,
    Config,
    GgufFamily,
    Names,
    Place,
    Value,
    common_metadata,
    expert_metadata,
    place_by_name,
    rope_of,
)

SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of the functions that turn router outputs into weights


def deepseek_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys, those of latent attention (one head of keys and values for all) and of experts."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    found = common_metadata(config) | expert_metadata(config)
    found |= {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
        "expert_gating_func": SIGMOID if config["model_type"] == "deepseek_v3" else SOFTMAX,
    }
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["model_type"] == "deepseek_v3" or config.get("topk_method") == "group_limited_greedy":
        if config.get("n_group"):
            found |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if rope_of(config).get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * float(rope_of(config)["mscale_all_dim"])
    return found


def place_latent(key: str, config: Config, names: Names) -> list[Place]:
    """Returns the place by name; the up-projection of keys and values becomes two tensors with a slice per head."""
    if key.endswith("kv_b_proj.weight"):
        sizes = (config["qk_nope_head_dim"], config["v_head_dim"])
        split = functools.partial(_per_head, heads=config["num_attention_heads"], sizes=sizes)
        keys, values = (names(key.replace("kv_b_proj", one)) for one in ("k_b_proj", "v_b_proj"))
        assert keys is not None, key
        assert values is not None, key
        return [
            Place(keys, change=lambda tensor: split(tensor)[0].transpose(1, 2).contiguous()),
            Place(values, change=lambda tensor: split(tensor)[1].contiguous()),
        ]
    return place_by_name(key.replace("e_score_correction_bias", "e_score_correction.bias"), config, names)


def _per_head(tensor: Tensor, *, heads: int, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns (heads, n, rank) the part of keys and (heads, v, rank) that of values."""
    keys, values = tensor.reshape(heads, sum(sizes), tensor.shape[1]).split(sizes, dim=1)
    return keys, values


def deepseek_objection(config: Config) -> str | None:
    """Returns what llama.cpp computes otherwise."""
    if config.get("moe_layer_freq", 1) != 1:
        return "moe_layer_freq other than 1"
    if config.get("attention_bias"):
        return "attention_bias=true"
    if config["model_type"] == "deepseek_v3" and config.get("rope_interleave") is False:
        return "rope_interleave=false"
    return None


for _kind, _title, _pre in (
    ("deepseek_v2", "DeepSeek V2", "deepseek-llm"),
    ("deepseek_v3", "DeepSeek V3", "deepseek-v3"),
):
    GGUF_FAMILIES.register(_kind)(
        GgufFamily(
            title=_title,
            arch="deepseek2",
            metadata=deepseek_metadata,
            place=place_latent,
            objection=deepseek_objection,
            pre_tokenizer=_pre,
        )
    )
