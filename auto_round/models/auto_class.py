"""Which of Transformers' auto classes builds a model, and which token ids stand for pictures and other media."""

from __future__ import annotations

from typing import Any

from auto_round.errors import UnsupportedError

# In order: where a config fits several and the checkpoint does not say which class it was saved from, the first wins.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# Ids of ordinary text among those that configs name.
TEXT_IDS = ("bos", "eos", "pad", "sep", "cls", "unk", "decoder_start")
MEDIA_CONFIGS = ("vision_config", "audio_config", "vision_tower_config", "visual")


def auto_class(config: Any) -> Any:
    """Returns the auto class of Transformers that builds the model of a config.

    The class that the checkpoint was saved from decides (`architectures`): the config of one model type can belong to a
    text-only and to a vision-language model.

    Raises:
        UnsupportedError: none does.
    """
    import transformers

    classes = [getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)]
    own_code = getattr(config, "auto_map", None) or {}
    fitting = [kind for kind in classes if type(config) in kind._model_mapping or kind.__name__ in own_code]
    saved_from = getattr(config, "architectures", None) or []
    for kind in fitting:
        if type(config) in kind._model_mapping and _class_name(kind._model_mapping[type(config)]) in saved_from:
            return kind
    if not fitting:
        raise UnsupportedError(
            f"{getattr(config, 'model_type', type(config).__name__)} is no language or vision-language model that this "
            "Transformers knows. Models that bring their own code need --trust_remote_code"
        )
    return fitting[0]


def _class_name(kind: Any) -> str:
    return (kind[0] if isinstance(kind, tuple) else kind).__name__


def takes_media(config: Any) -> bool:
    """Whether a model of this config takes pictures or other media besides text."""
    return any(getattr(config, name, None) is not None for name in MEDIA_CONFIGS)


def media_token_ids(config: Any) -> set[int]:
    """Returns the token ids that stand for pictures, sound and their borders; text must not hold them."""
    found: set[int] = set()
    parts = [config, *(part for name in MEDIA_CONFIGS if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        for name, value in vars(part).items() if hasattr(part, "__dict__") else ():
            is_id = name.endswith(("_token_id", "_token_index", "_patch_id", "_token_ids"))
            if is_id and not name.startswith(TEXT_IDS):
                found |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return found
