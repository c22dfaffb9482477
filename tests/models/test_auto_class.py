from types import SimpleNamespace

import pytest
import transformers

from auto_round.errors import UnsupportedError
from auto_round.models.auto_class import auto_class, media_token_ids, takes_media


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.LlamaConfig(), "AutoModelForCausalLM"),
        (transformers.Qwen2VLConfig(), "AutoModelForImageTextToText"),
        # This one belongs to a text-only and to a vision-language model; what it was saved from decides.
        (transformers.Llama4Config(architectures=["Llama4ForConditionalGeneration"]), "AutoModelForImageTextToText"),
        (transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]), "AutoModelForCausalLM"),
    ],
)
def test_the_auto_class_is_that_of_the_model_that_was_saved(config, name):
    assert auto_class(config).__name__ == name


def test_a_config_that_is_no_language_model_is_refused():
    with pytest.raises(UnsupportedError, match=r"clip_vision_model is no language or vision-language model"):
        auto_class(transformers.CLIPVisionConfig())


def test_a_model_with_its_own_code_names_its_class():
    config = SimpleNamespace(model_type="mine", auto_map={"AutoModelForCausalLM": "code.Model"}, architectures=None)
    assert auto_class(config).__name__ == "AutoModelForCausalLM"


def test_ids_of_pictures_are_told_from_those_of_text():
    config = transformers.Qwen2VLConfig(
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8
    )
    assert media_token_ids(config) == {5, 6, 7, 8}
    assert media_token_ids(transformers.LlavaConfig(image_token_index=9)) == {9}
    assert media_token_ids(transformers.LlamaConfig(bos_token_id=1, eos_token_id=2)) == set()
    assert takes_media(config)
    assert not takes_media(transformers.LlamaConfig())
