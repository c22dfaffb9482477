"""Phi-3 and Phi-4-mini: queries, keys and values in one matrix, gate and up in another, as llama.cpp has them too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auto_round.formats.gguf.families.base import GGUF_FAMILIES, Config, GgufFamily, Value, common_metadata, rope_of


def phi3_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys, the rotated part of a head, the window, and the scale of long contexts."""
    rope = rope_of(config)
    head = config["hidden_size"] // config["num_attention_heads"]
    found = common_metadata(config)
    found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    found["attention.sliding_window"] = config.get("sliding_window") or 0
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original:
        stretch = config["max_position_embeddings"] / original
        found["rope.scaling.original_context_length"] = original
        factor = rope.get("attention_factor") or (
            math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        )
        found["rope.scaling.attn_factor"] = float(factor)
    return found


def long_and_short(config: Config) -> dict[str, Tensor]:
    """Returns the two sets of factors by which rotary frequencies are divided in long and in short contexts."""
    rope = rope_of(config)
    if rope.get("rope_type") != "longrope":
        return {}
    kinds = ("long", "short")
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32) for kind in kinds}


GGUF_FAMILIES.register("phi3")(
    GgufFamily(title="Phi-3, Phi-4-mini", arch="phi3", metadata=phi3_metadata, tensors=long_and_short)
)
