"""What GGUF needs to know of an architecture: hyperparameters, names of tensors, and what changes on the way.

A family is data: the defaults here serve most decoders, its file says what differs. Configs come as plain dictionaries,
as config.json has them. Sources: the `gguf` package's table of names, and what src/models/*.cpp of llama.cpp reads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.registry import Registry

Config = Mapping[str, Any]
Value = bool | int | float | str | list[Any]
# Name of a stored tensor -> its name in the file, or None.
Names = Callable[[str], "str | None"]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
        name: of the tensor in the file.
        order: another order of its rows, the first dimension; packed rows go through it as well. None: as stored.
        change: other values, or rows along another dimension; a packed weight cannot go through it. None: as stored.
        expert: which slice of the stacked tensor it is, or None for the whole.
    """

    name: str
    order: Callable[[Tensor], Tensor] | None = None
    change: Callable[[Tensor], Tensor] | None = None
    expert: int | None = None


def common_metadata(config: Config) -> dict[str, Value]:
    """Returns what almost all architectures have; keys stand below the architecture's name."""
    heads = config["num_attention_heads"]
    found: dict[str, Value] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
    }
    if config.get("head_dim"):
        found |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if config.get("rms_norm_eps") is not None:
        found["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    return found | rope_metadata(rope_of(config))


def rope_of(config: Config, layers: str = "full_attention") -> Config:
    """Returns the rotary parameters, of one kind of layers where kinds have their own."""
    parameters = config.get("rope_parameters") or {}
    return parameters.get(layers) or parameters


def rope_metadata(rope: Config) -> dict[str, Value]:
    """Returns base and scaling of rotary embeddings. Llama 3's scaling is a tensor instead, Phi-3's two."""
    found: dict[str, Value] = {}
    if rope.get("rope_theta") is not None:
        found["rope.freq_base"] = float(rope["rope_theta"])
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind in ("linear", "yarn") and factor is not None:
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        if rope.get("original_max_position_embeddings"):
            found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for key, name in YARN_KEYS.items():
            if rope.get(key) is not None:
                found[f"rope.scaling.{name}"] = float(rope[key])
    return found


YARN_KEYS = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def expert_metadata(config: Config) -> dict[str, Value]:
    """Returns the numbers of a mixture of experts, by whichever name the config has them under."""
    names = {
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
    }
    found = {key: next((config[one] for one in keys if config.get(one)), None) for key, keys in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def llama3_factors(config: Config) -> dict[str, Tensor]:
    """Returns the tensor by which Llama 3 divides rotary frequencies: 1 for fast ones, `factor` for slow ones.

    Source: Transformers' modeling_rope_utils._compute_llama3_parameters.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1.0 / ((1 - smooth) / factor + smooth)}


def place_by_name(key: str, config: Config, names: Names) -> list[Place]:  # noqa: ARG001
    """Returns the place by the package's table of names. Experts stored one by one are stacked."""
    one = re.fullmatch(r"(.+\.experts)\.(\d+)\.(.+)", key)
    name = names(f"{one[1]}.{one[3]}" if one else key)
    return [] if name is None else [Place(name, expert=int(one[2]) if one else None)]


def no_tensors(config: Config) -> dict[str, Tensor]:  # noqa: ARG001
    """Returns nothing: all tensors of the file come from the checkpoint."""
    return {}


def no_objection(config: Config) -> str | None:  # noqa: ARG001
    """Returns None: every model of the family is held."""
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One architecture.

    Attributes:
        title: for people.
        arch: llama.cpp's name of the architecture.
        metadata: config -> hyperparameters, keys without the architecture's name.
        place: key of a stored tensor -> its places; none for a name that is unknown.
        tensors: config -> tensors that no checkpoint stores.
        objection: config -> what llama.cpp computes otherwise, or None.
        pre_tokenizer: name that llama.cpp expects where a pattern of splitting has several.
        vocabulary: further keys of the vocabulary, below "tokenizer.ggml.".
    """

    title: str
    arch: str
    metadata: Callable[[Config], dict[str, Value]] = common_metadata
    place: Callable[[str, Config, Names], list[Place]] = place_by_name
    tensors: Callable[[Config], dict[str, Tensor]] = no_tensors
    objection: Callable[[Config], str | None] = no_objection
    pre_tokenizer: str | None = None
    vocabulary: Mapping[str, Value] = dataclasses.field(default_factory=dict)


GGUF_FAMILIES: Registry[GgufFamily] = Registry("GGUF architecture")
