"""Qwen2 and Qwen3, with and without experts."""

from __future__ import annotations

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


def sections_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys, and how rotary frequencies are shared by time, height and width."""
    sections = list(rope_of(config)["mrope_section"])
    return common_metadata(config) | {"rope.dimension_sections": [*sections, *[0] * (4 - len(sections))]}


def moe_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys and the numbers of experts, the shared one's included."""
    found = common_metadata(config) | expert_metadata(config)
    if config.get("shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def place_with_shared_gate(key: str, config: Config, names: Names) -> list[Place]:
    """Returns the place by name; the gate of the shared expert, one row, is a vector in the file."""
    places = place_by_name(key, config, names)
    if not key.endswith("shared_expert_gate.weight"):
        return places
    return [Place(place.name, change=lambda tensor: tensor.reshape(-1)) for place in places]


def sliding_window(config: Config) -> str | None:
    """Returns why a model with windows of attention is not what llama.cpp computes, or None."""
    if config.get("use_sliding_window"):
        return "use_sliding_window=true (llama.cpp attends to everything)"
    return None


def _dense_layers(config: Config) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "layers without experts (mlp_only_layers, decoder_sparse_step)"
    return sliding_window(config)


def qwen2_moe_objection(config: Config) -> str | None:
    """Returns what llama.cpp's qwen2moe does otherwise."""
    if config.get("norm_topk_prob"):
        return "norm_topk_prob=true (llama.cpp leaves the weights of experts as they are)"
    return _dense_layers(config)


def qwen3_moe_objection(config: Config) -> str | None:
    """Returns what llama.cpp's qwen3moe does otherwise."""
    if not config.get("norm_topk_prob"):
        return "norm_topk_prob=false (llama.cpp makes the weights of the chosen experts sum to one)"
    return _dense_layers(config)


GGUF_FAMILIES.register("qwen2")(GgufFamily(title="Qwen2, Qwen2.5", arch="qwen2", objection=sliding_window))
GGUF_FAMILIES.register("qwen2_vl_text", "qwen2_5_vl_text")(
    GgufFamily(title="Qwen2-VL, Qwen2.5-VL", arch="qwen2vl", metadata=sections_metadata, objection=sliding_window)
)
GGUF_FAMILIES.register("qwen3")(GgufFamily(title="Qwen3", arch="qwen3", objection=sliding_window))
GGUF_FAMILIES.register("qwen2_moe")(
    GgufFamily(
        title="Qwen2-MoE",
        arch="qwen2moe",
        metadata=moe_metadata,
        place=place_with_shared_gate,
        objection=qwen2_moe_objection,
    )
)
GGUF_FAMILIES.register("qwen3_moe")(
    GgufFamily(title="Qwen3-MoE", arch="qwen3moe", metadata=moe_metadata, objection=qwen3_moe_objection)
)
