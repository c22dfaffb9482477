"""Llama 2 and 3, Mistral, Falcon 3, SmolLM and whatever else is a Llama to Transformers; Mixtral.

Queries and keys are stored with each head's rotated features as two halves; llama.cpp rotates neighbouring ones.
"""

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
    llama3_factors,
    place_by_name,
)


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Returns the rows of each head with its two halves interleaved: 0, n/2, 1, n/2 + 1 ..."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def place_rotated(key: str, config: Config, names: Names) -> list[Place]:
    """Returns the place by name; queries and keys get their rows reordered."""
    places = place_by_name(key, config, names)
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    layer = key.split(".")[-2]
    if layer not in heads:
        return places
    order = functools.partial(neighbours, heads=heads[layer])
    return [Place(place.name, order=order) for place in places]


def llama_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys and the length of the rotated part."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return common_metadata(config) | {"rope.dimension_count": head}


def mixtral_metadata(config: Config) -> dict[str, Value]:
    """Returns Llama's keys and the numbers of experts."""
    return llama_metadata(config) | expert_metadata(config)


LLAMA = GgufFamily(
    title="Llama 2 and 3, Mistral, Falcon 3, SmolLM",
    arch="llama",
    metadata=llama_metadata,
    place=place_rotated,
    tensors=llama3_factors,
)
GGUF_FAMILIES.register("llama", "mistral")(LLAMA)
GGUF_FAMILIES.register("mixtral")(
    GgufFamily(title="Mixtral", arch="llama", metadata=mixtral_metadata, place=place_rotated)
)
