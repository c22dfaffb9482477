"""Vision towers that llama.cpp reads from a file of their own, which stands beside the text model's: mmproj-*.gguf.

Names of tensors come from the `gguf` package's table; keys and what changes on the way are those that clip.cpp of
llama.cpp reads. Nothing is quantized there: matrices are F16 or BF16, the rest is F32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.formats.gguf.families.base import Names, Place, Value
from auto_round.registry import Registry

Config = Mapping[str, Any]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCHES = "v.patch_embd.weight"
# Kept in F32: the convolution of patches in bfloat16 files, and what is added to activations.
FLOAT32 = ("v.position_embd.weight",)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionFamily:
    """One kind of vision tower with its projector.

    Attributes:
        title: for people.
        projector: llama.cpp's name of the projector.
        parts: what the names of its stored tensors start with.
        metadata: vision config -> keys that only this kind has, or has under other names; complete with "clip.".
        place: key of a stored tensor, without what stands before `parts` -> its places.
        mean, std: of pixels, of the published models, where no preprocessor says it.
    """

    title: str
    projector: str
    parts: tuple[str, ...]
    metadata: Callable[[Config], dict[str, Value]]
    place: Callable[[str, Names], list[Place]]
    mean: list[float]
    std: list[float]

    def key_of(self, key: str) -> str | None:
        """Returns a stored tensor's key from its part on, or None where it belongs to the text model."""
        short = key.removeprefix("model.")
        return short if short.startswith(self.parts) else None


VISION_FAMILIES: Registry[VisionFamily] = Registry("GGUF vision tower")


def vision_family(model_config: Any) -> VisionFamily | None:
    """Returns the kind of a model's vision tower; None for a text model, or a kind that is not known."""
    kind = str(getattr(model_config, "model_type", ""))
    return VISION_FAMILIES[kind] if kind in VISION_FAMILIES else None


def place_qwen(key: str, names: Names) -> list[Place]:
    """Returns the places by name; joined queries, keys and values become three tensors, both frames of patches two."""
    if ".attn.qkv." in key:
        found = []
        for index, one in enumerate(("q", "k", "v")):
            name = names(key.replace("qkv", one))
            assert name is not None, key
            found.append(Place(name, change=lambda tensor, index=index: tensor.chunk(3)[index]))
        return found
    if key.endswith("patch_embed.proj.weight"):
        return [
            Place(name, change=lambda tensor, frame=frame: tensor[:, :, frame].contiguous())
            for frame, name in enumerate((PATCHES, f"{PATCHES}.1"))
        ]
    name = names(key)
    return [] if name is None else [Place(name)]


def qwen2_metadata(config: Config) -> dict[str, Value]:
    """Returns sizes by Qwen2-VL's names: its `hidden_size` is the text model's."""
    width = config["embed_dim"]
    return {
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": int(width * config["mlp_ratio"]),
        **_qwen_metadata(config),
    }


def qwen25_metadata(config: Config) -> dict[str, Value]:
    """Returns sizes, and every how many blocks attention sees the whole picture."""
    whole = list(config["fullatt_block_indexes"])
    period = whole[0] + 1
    if whole != list(range(period - 1, period * len(whole), period)):
        raise UnsupportedError(f"gguf: fullatt_block_indexes={whole} (llama.cpp needs every n-th block)")
    return {
        "clip.vision.embedding_length": config["hidden_size"],
        "clip.vision.feed_forward_length": config["intermediate_size"],
        "clip.vision.n_wa_pattern": period,
        "clip.use_silu": True,
        **_qwen_metadata(config),
    }


def _qwen_metadata(config: Config) -> dict[str, Value]:
    if config["temporal_patch_size"] != 2 or config["spatial_merge_size"] != 2:
        raise UnsupportedError(
            f"gguf: temporal_patch_size={config['temporal_patch_size']} spatial_merge_size="
            f"{config['spatial_merge_size']} (llama.cpp takes 2 and 2)"
        )
    return {
        "clip.vision.image_size": config.get("image_size", 560),  # any size goes; converters write this one
        "clip.vision.block_count": config["depth"],
        "clip.vision.attention.head_count": config["num_heads"],
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
    }


def place_gemma(key: str, names: Names) -> list[Place]:
    """Returns the place by name; the pooling head is not used, and the projector's norm multiplies by one more."""
    key = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)
    if key.startswith("vision_tower.vision_model.head."):
        return []
    name = names(key.replace("mm_input_projection_weight", "mm_input_projection.weight"))
    if name is None:
        return []
    is_norm = key.endswith("mm_soft_emb_norm.weight")
    return [Place(name, change=_plus_one if is_norm else None)]


def _plus_one(tensor: Tensor) -> Tensor:
    return tensor.float() + 1


def gemma_metadata(config: Config) -> dict[str, Value]:
    """Returns sizes, the activation, and over how many patches the projector pools where that is not 4."""
    side = config["image_size"] // config["patch_size"]
    pooled = side // max(int(config["mm_tokens_per_image"] ** 0.5), 1)
    found: dict[str, Value] = {
        "clip.vision.image_size": config["image_size"],
        "clip.vision.block_count": config["num_hidden_layers"],
        "clip.vision.embedding_length": config["hidden_size"],
        "clip.vision.feed_forward_length": config["intermediate_size"],
        "clip.vision.attention.head_count": config["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "clip.use_gelu": True,
    }
    return found | ({"clip.vision.projector.scale_factor": pooled} if pooled != 4 else {})


for _kind, _title, _projector, _metadata in (
    ("qwen2_vl", "Qwen2-VL", "qwen2vl_merger", qwen2_metadata),
    ("qwen2_5_vl", "Qwen2.5-VL", "qwen2.5vl_merger", qwen25_metadata),
):
    VISION_FAMILIES.register(_kind)(
        VisionFamily(
            title=_title,
            projector=_projector,
            parts=("visual.",),
            metadata=_metadata,
            place=place_qwen,
            mean=CLIP_MEAN,
            std=CLIP_STD,
        )
    )
VISION_FAMILIES.register("gemma3")(
    VisionFamily(
        title="Gemma 3",
        projector="gemma3",
        parts=("vision_tower.", "multi_modal_projector."),
        metadata=gemma_metadata,
        place=place_gemma,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    )
)
