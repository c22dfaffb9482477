"""StarCoder2, OLMo2, Granite and GLM-4: decoders that need a few keys of their own and nothing else."""

from __future__ import annotations

from auto_round.formats.gguf.families.base import (
    GGUF_FAMILIES,
    Config,
    GgufFamily,
    Value,
    common_metadata,
    llama3_factors,
    rope_of,
)
from auto_round.formats.gguf.families.llama import llama_metadata, place_rotated


def starcoder2_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys; its norms subtract the mean."""
    return common_metadata(config) | {"attention.layer_norm_epsilon": float(config["norm_epsilon"])}


def starcoder2_objection(config: Config) -> str | None:
    """Returns what llama.cpp's starcoder2 does otherwise."""
    return None if config.get("use_bias", True) else "use_bias=false (llama.cpp expects biases)"


def granite_metadata(config: Config) -> dict[str, Value]:
    """Returns Llama's keys and the four multipliers."""
    return llama_metadata(config) | {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }


def glm4_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys and the rotated part of a head."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = rope_of(config).get("partial_rotary_factor", 0.5)
    return common_metadata(config) | {"rope.dimension_count": int(head * part)}


GGUF_FAMILIES.register("starcoder2")(
    GgufFamily(title="StarCoder2", arch="starcoder2", metadata=starcoder2_metadata, objection=starcoder2_objection)
)
GGUF_FAMILIES.register("olmo2")(GgufFamily(title="OLMo2", arch="olmo2"))
GGUF_FAMILIES.register("granite")(
    GgufFamily(title="Granite", arch="granite", metadata=granite_metadata, place=place_rotated, tensors=llama3_factors)
)
GGUF_FAMILIES.register("glm4")(GgufFamily(title="GLM-4", arch="glm4", metadata=glm4_metadata, pre_tokenizer="glm4"))
