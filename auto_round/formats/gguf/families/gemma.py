"""Gemma 2 and the text part of Gemma 3. Their norms multiply by one plus the stored weight; llama.cpp wants the sum."""

from __future__ import annotations

from torch import Tensor

from auto_round.formats.gguf.families.base import (
    GGUF_FAMILIES,
    Config,
    GgufFamily,
    Names,
    Place,
    Value,
    common_metadata,
    place_by_name,
    rope_of,
)

LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models, whose attention llama.cpp scales otherwise
PATTERN = {"gemma2": 2, "gemma3_text": 6}  # every so many layers attend to everything


def place_with_one_added(key: str, config: Config, names: Names) -> list[Place]:
    """Returns the place by name, norms with one added."""
    places = place_by_name(key, config, names)
    if not key.endswith("norm.weight"):
        return places
    return [Place(place.name, change=_plus_one) for place in places]


def _plus_one(tensor: Tensor) -> Tensor:
    return tensor.float() + 1


def gemma_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys, the window, and the caps of logits where there are any."""
    found = common_metadata(config) | {"attention.sliding_window": config["sliding_window"]}
    for key, name in (("attn_logit_softcapping", "attn_logit"), ("final_logit_softcapping", "final_logit")):
        if config.get(key):
            found[f"{name}_softcapping"] = float(config[key])
    windowed = rope_of(config, "sliding_attention")
    if config["model_type"] == "gemma3_text" and windowed.get("rope_theta"):
        found["rope.freq_base_swa"] = float(windowed["rope_theta"])
    return found


def gemma_objection(config: Config) -> str | None:
    """Returns what llama.cpp computes otherwise: it knows the released models' attention scales and windows."""
    kind, layers, head = config["model_type"], config["num_hidden_layers"], config["head_dim"]
    wanted = config["hidden_size"] // config["num_attention_heads"] if layers == LARGEST[kind] else head
    if config.get("query_pre_attn_scalar", wanted) != wanted:
        return f"query_pre_attn_scalar={config['query_pre_attn_scalar']} (llama.cpp takes {wanted})"
    pattern = PATTERN[kind]
    names = ("sliding_attention", "full_attention")
    usual = [names[(index + 1) % pattern == 0] for index in range(layers)]
    if list(config.get("layer_types") or usual) != usual:
        return f"layer_types (llama.cpp lets every {pattern}th layer attend to everything, the others to a window)"
    return None


for _kind, _arch, _title in (("gemma2", "gemma2", "Gemma 2"), ("gemma3_text", "gemma3", "Gemma 3 text")):
    GGUF_FAMILIES.register(_kind)(
        GgufFamily(
            title=_title,
            arch=_arch,
            metadata=gemma_metadata,
            place=place_with_one_added,
            objection=gemma_objection,
            vocabulary={"add_space_prefix": False},
        )
    )
