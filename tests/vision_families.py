"""Tiny random vision-language models of each family, and what the model takes of a text and of a picture.

Each is made from a config of its family, so that its code runs as it does for the published models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

WORDS, IMAGE, VIDEO, START, END = 128, 120, 121, 122, 123
ORDINARY = 110  # ids below it are words that no processor gives a meaning
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"vocab_size": WORDS, "initializer_range": 0.1, **SPECIAL, **SIZES, **HEADS}
MEDIA_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "initializer_range": 0.1,
}  # fmt: skip
# Transformers' rotary embedding in three parts: time, height, width.
THREE_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

MakeInputs = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class VisionFamily:
    """A family and its tiny model.

    Attributes:
        title: as people call it.
        architecture: class of Transformers.
        config: keyword arguments of its config class.
        blocks: the list of decoder layers that has to be found.
        picture: (count of image tokens, generator) -> what the model takes besides tokens.
        image_tokens: how many places in the text one picture takes.
        note: what is special.
    """

    title: str
    architecture: str
    config: dict[str, Any]
    blocks: str
    picture: MakeInputs
    image_tokens: int
    note: str = ""

    @property
    def is_there(self) -> bool:
        """Whether the installed Transformers has it."""
        return hasattr(transformers, self.architecture)

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """Returns the tiny model, the same random weights each time."""
        kind = getattr(transformers, self.architecture)
        config = kind.config_class(**self.config)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = kind(config)
            for name, parameter in model.named_parameters():
                # Some families start gates and positions at zero, which would hide what passes through them.
                if not parameter.any() or name.endswith("bias"):
                    parameter.data.normal_(0, 0.2)
                # Not model.to(dtype): that makes real numbers of Llama 4's complex tables of rotations.
                parameter.data = parameter.data.to(dtype)
        return model.eval()

    def text(self, samples: int = 6, tokens: int = 24, seed: int = 0) -> Tensor:
        """Returns (samples, tokens) ids of ordinary words."""
        return torch.randint(2, ORDINARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))

    def with_picture(self, tokens: int = 20, seed: int = 0) -> dict[str, Tensor]:
        """Returns the model's inputs for one picture within `tokens` words."""
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(2, ORDINARY, (tokens,), generator=generator)
        places = [torch.tensor([START]), torch.full((self.image_tokens,), IMAGE), torch.tensor([END])]
        ids = torch.cat([words[: tokens // 2], *places, words[tokens // 2 :]])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.picture(generator)}
        if self.architecture in WITH_TOKEN_TYPES:
            inputs[WITH_TOKEN_TYPES[self.architecture]] = (ids == IMAGE).long()
        if self.architecture == "MllamaForConditionalGeneration":
            inputs["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, 4, dtype=torch.long)
        return inputs


WITH_TOKEN_TYPES = {
    "Gemma3ForConditionalGeneration": "token_type_ids",
    "Qwen2VLForConditionalGeneration": "mm_token_type_ids",
    "Qwen2_5_VLForConditionalGeneration": "mm_token_type_ids",
    "Qwen3VLForConditionalGeneration": "mm_token_type_ids",
    "Qwen3VLMoeForConditionalGeneration": "mm_token_type_ids",
    "Glm4vForConditionalGeneration": "mm_token_type_ids",
    "Glm46VForConditionalGeneration": "mm_token_type_ids",
    "PaliGemmaForConditionalGeneration": "token_type_ids",
}


def pixels(*shape: int, **more: Any) -> MakeInputs:
    """Returns a maker of `pixel_values` of this shape, with more tensors beside it."""

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        values = torch.randn(*shape, generator=generator)
        return {"pixel_values": values, **{name: torch.tensor(value) for name, value in more.items()}}

    return make


def patches(size: int) -> MakeInputs:
    """Returns a maker of Qwen's flat patches: a picture of 4 by 4 patches, which 2 by 2 become one token."""
    return pixels(16, 3 * 2 * size * size, image_grid_thw=[[1, 4, 4]])


def phi_picture(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "image_pixel_values": torch.randn(1, 2, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[32, 32]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4, dtype=torch.bool),
    }


FAMILIES = {
    "qwen2_vl": VisionFamily(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": THREE_ROTARY},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8},
            **MEDIA_IDS, **SPECIAL,
        },
        "model.language_model.layers", patches(8), 4,
    ),
    "qwen2_5_vl": VisionFamily(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": THREE_ROTARY},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
                "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1],
            },
            **MEDIA_IDS, **SPECIAL,
        },
        "model.language_model.layers", patches(8), 4,
    ),
    "qwen3_vl": VisionFamily(
        "Qwen3-VL", "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 16, "rope_parameters": THREE_ROTARY},
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
                "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
            },
            **MEDIA_IDS, "tie_word_embeddings": True,
        },
        "model.language_model.layers", patches(8), 4, "vision features are added between decoder blocks",
    ),
    "qwen3_vl_moe": VisionFamily(
        "Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **TEXT, "head_dim": 16, "rope_parameters": THREE_ROTARY, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
            "vision_config": {
                "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
                "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
            },
            **MEDIA_IDS, "tie_word_embeddings": False,
        },
        "model.language_model.layers", patches(8), 4, "fused experts stay in 16 bits",
    ),
    "llava": VisionFamily(
        "LLaVA 1.5", "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model",
            **TOWER},
            "image_token_index": IMAGE, "image_seq_length": 4,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 4,
    ),
    "llava_next": VisionFamily(
        "LLaVA-NeXT, Granite Vision", "LlavaNextForConditionalGeneration",
        {
            "text_config": {"model_type": "granite", **TEXT}, "vision_config": {"model_type": "siglip_vision_model",
            **TOWER},
            "image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]], "vision_feature_select_strategy": "full",
            "vision_feature_layer": [-2, -1],
        },
        "model.language_model.layers", pixels(1, 2, 3, 16, 16, image_sizes=[[16, 16]]), 10,
    ),
    "mllama": VisionFamily(
        "Llama 3.2 Vision", "MllamaForConditionalGeneration",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default",
            "rope_theta": 1e4}},
            "vision_config": {
                "hidden_size": 32, "attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2,
                "vision_output_dim": 64,
                "num_global_layers": 1, "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [1],
            },
            "image_token_index": IMAGE,
        },
        "model.language_model.layers",
        pixels(1, 1, 4, 3, 16, 16, aspect_ratio_ids=[[1]], aspect_ratio_mask=[[[1, 0, 0, 0]]]), 1,
        "cross-attention blocks run for pictures only; calibrated on text they are rounded without tuning",
    ),
    "llama4": VisionFamily(
        "Llama 4", "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **TEXT, "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "moe_layers": [1],
                "attention_chunk_size": 16, "num_hidden_layers": 4,
            },
            "vision_config": {
                **TOWER, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "image_token_index": IMAGE,
        },
        "language_model.model.layers", pixels(1, 3, 16, 16), 1,
    ),
    "gemma3": VisionFamily(
        "Gemma 3", "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **TEXT, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
            "vision_config": {"model_type": "siglip_vision_model", **TOWER},
            "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 4,
    ),
    "mistral3": VisionFamily(
        "Mistral Small 3.1", "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 32, "head_dim": 16},
            "image_token_index": IMAGE, "tie_word_embeddings": False,
        },
        "model.language_model.layers", pixels(1, 3, 32, 32, image_sizes=[[32, 32]]), 4,
    ),
    "pixtral": VisionFamily(
        "Pixtral", "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 16},
            "image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        },
        "model.language_model.layers", pixels(1, 3, 16, 16, image_sizes=[[16, 16]]), 4,
    ),
    "idefics3": VisionFamily(
        "Idefics3", "Idefics3ForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT}, "vision_config": TOWER, "image_token_id": IMAGE, **SPECIAL,
            "scale_factor": 2,
        },
        "model.text_model.layers", pixels(1, 1, 3, 16, 16), 1,
    ),
    "smolvlm": VisionFamily(
        "SmolVLM", "SmolVLMForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT}, "vision_config": TOWER, "image_token_id": IMAGE, **SPECIAL,
            "scale_factor": 2,
        },
        "model.text_model.layers", pixels(1, 1, 3, 16, 16), 1,
    ),
    "idefics2": VisionFamily(
        "Idefics2", "Idefics2ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
            "vision_config": TOWER,
            "perceiver_config": {
                "hidden_size": 64, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                "resampler_head_dim": 16, "num_key_value_heads": 1,
            },
            "image_token_id": IMAGE, **SPECIAL,
        },
        "model.text_model.layers", pixels(1, 1, 3, 16, 16), 3,
    ),
    "internvl": VisionFamily(
        "InternVL", "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False,
        },
        "model.language_model.layers", pixels(1, 3, 32, 32), 4,
    ),
    "glm4v": VisionFamily(
        "GLM-4V (4.1V)", "Glm4vForConditionalGeneration",
        {
            "text_config": {**TEXT, "rope_parameters": {**THREE_ROTARY, "partial_rotary_factor": 1.0}},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
                "patch_size": 8, "image_size": 32,
            },
            **MEDIA_IDS, "image_start_token_id": START, "image_end_token_id": END,
            "video_start_token_id": 124, "video_end_token_id": 125,
        },
        "model.language_model.layers", patches(8), 4,
    ),
    "glm46v": VisionFamily(
        "GLM-4.6V", "Glm46VForConditionalGeneration",
        {
            "text_config": {
                "model_type": "glm4v_text", **TEXT, "rope_parameters": {**THREE_ROTARY, "partial_rotary_factor": 1.0},
            },
            "vision_config": {
                "model_type": "glm4v_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 64,
                "out_hidden_size": 64,
                "num_heads": 2, "patch_size": 8, "image_size": 32,
            },
            **MEDIA_IDS, "image_start_token_id": START, "image_end_token_id": END,
            "video_start_token_id": 124, "video_end_token_id": 125,
        },
        "model.language_model.layers", patches(8), 4,
    ),
    "aria": VisionFamily(
        "Aria", "AriaForConditionalGeneration",
        {
            "text_config": {**TEXT, "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1},
            "vision_config": {"model_type": "idefics3_vision", **TOWER},
            "projector_patch_to_query_dict": {4: 3}, "image_token_index": IMAGE,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 3,
    ),
    "deepseek_vl": VisionFamily(
        "DeepSeek-VL", "DeepseekVLForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "siglip_vision_model",
            **TOWER},
            "image_token_id": IMAGE, "tie_word_embeddings": False,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 4,
    ),
    "phi4_multimodal": VisionFamily(
        "Phi-4 multimodal", "Phi4MultimodalForCausalLM",
        {
            **TEXT, "original_max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            "vision_config": {**TOWER, "image_size": 32, "crop_size": 32, "image_token_id": IMAGE,
            "num_hidden_layers": 3},
            "audio_config": {
                "hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2, "input_size": 16,
                "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
                "audio_token_id": 121,
            },
        },
        "model.layers", phi_picture, 13,
    ),
    "paligemma": VisionFamily(
        "PaliGemma", "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **TEXT, "head_dim": 16},
            "vision_config": {"model_type": "siglip_vision_model", **TOWER, "projection_dim": 64,
            "num_image_tokens": 4},
            "image_token_index": IMAGE, "projection_dim": 64, "hidden_size": 64, "vocab_size": WORDS,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 4,
    ),
    "aya_vision": VisionFamily(
        "Aya Vision", "AyaVisionForConditionalGeneration",
        {
            "text_config": {"model_type": "cohere2", **TEXT, "head_dim": 16, "sliding_window": 8, "logit_scale": 1.0},
            "vision_config": {"model_type": "siglip_vision_model", **TOWER}, "image_token_index": IMAGE,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 1,
    ),
    "llava_onevision": VisionFamily(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **TEXT}, "vision_config": {"model_type": "siglip_vision_model",
            **TOWER},
            "image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": [[16, 16]],
            "tie_word_embeddings": False,
        },
        "model.language_model.layers", pixels(1, 2, 3, 16, 16, image_sizes=[[16, 16]]), 10,
    ),
    "cohere2_vision": VisionFamily(
        "Command A Vision", "Cohere2VisionForConditionalGeneration",
        {
            "text_config": {"model_type": "cohere2", **TEXT, "head_dim": 16, "sliding_window": 8, "logit_scale": 1.0},
            "vision_config": {"model_type": "siglip_vision_model", **TOWER}, "image_token_id": IMAGE,
            "alignment_intermediate_size": 64,
        },
        "model.language_model.layers", pixels(1, 3, 16, 16), 1,
    ),
    "kimi_k25": VisionFamily(
        "Kimi K2.5 (Kimi-VL's successor)", "Kimi_K25ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "deepseek_v3", **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 32,
                "q_lora_rank": 32, "qk_rope_head_dim": 32, "v_head_dim": 16, "qk_nope_head_dim": 16,
            },
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "patch_size": 8,
                "pos_emb_height": 4, "pos_emb_width": 4,
            },
            "projection_hidden_size": 32, **MEDIA_IDS, "tie_word_embeddings": False,
        },
        "model.language_model.layers", pixels(16, 3, 8, 8, image_grid_thw=[[1, 4, 4]]), 4,
    ),
    "molmo2": VisionFamily(
        "Molmo 2", "Molmo2ForConditionalGeneration",
        {
            "text_config": {**TEXT, "head_dim": 16, "additional_vocab_size": 8},
            "vision_config": {
                **TOWER, "num_key_value_heads": 2, "head_dim": 16, "image_size": [16, 16], "num_position_embeddings": 4,
            },
            "adapter_config": {
                "vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 16, "intermediate_size": 64, "text_hidden_size": 64,
            },
            "image_patch_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END,
            "low_res_image_start_token_id": 124, "frame_start_token_id": 125, "frame_end_token_id": 126,
        },
        "model.language_model.layers",
        pixels(1, 4, 192, image_token_pooling=[[0, 1, 2, 3]], image_grids=[[1, 1, 0, 0]], image_num_crops=[1]), 1,
        "q, k, v and gate, up are stored joined and stay in 16 bits",
    ),
}  # fmt: skip
