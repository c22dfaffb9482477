"""Pictures from files through real processors of Transformers, to a quantized folder that generates about a picture."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from vision_families import END, FAMILIES, IMAGE, START, VIDEO, WORDS

from auto_round import AutoRound, AutoRoundMLLM
from auto_round.errors import CalibrationError

pytest.importorskip("PIL")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_pictures.py"
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def write_pictures(folder, count):
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_pictures(folder, count)


def tokenizer(picture):
    """Returns a tokenizer of the tiny models' words: the first words of the script's conversations, and the marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "</s>",
        "<pad>",
        "<unk>",
        "What",
        "is",
        "in",
        "the",
        "middle",
        "of",
        "picture?",
        "Which",
        "shape",
        "A",
        "red",
    ]
    names = {word: index for index, word in enumerate(words)}
    names |= {f"w{index}": index for index in range(len(words), WORDS)}
    special = {IMAGE: picture, VIDEO: "<video>", START: "<|vision_start|>", END: "<|vision_end|>"}
    names = {special.get(index, name): index for name, index in names.items()}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(special.values())})
    return fast


def llava_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return transformers.LlavaProcessor(
        images, tokenizer("<image>"), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE.replace("MARK", "<image>"),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Returns a LLaVA folder with its processor, as the hub has them."""
    place = tmp_path / "model"
    FAMILIES["llava"].model().save_pretrained(place)
    llava_processor().save_pretrained(place)
    return place


OPTIONS = {"bits": 4, "group_size": 32, "iters": 1, "nsamples": 6, "seqlen": 64, "batch_size": 2, "device": "cpu"}


def test_a_folder_is_calibrated_on_picture_files_and_answers_about_one(folder, tmp_path):
    file = write_pictures(tmp_path / "data", 8)
    options = {**OPTIONS, "dataset": str(file), "extra_data_dir": f"image={tmp_path / 'data' / 'pictures'}"}
    AutoRound(str(folder), **options).quantize_and_save(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    picture = str(tmp_path / "data" / "pictures" / "000.png")
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "Which shape"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 4
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["dataset"] == str(file)


def test_a_model_in_memory_takes_its_processor_along_and_gives_the_same_bytes(folder, tmp_path):
    from safetensors.torch import load_file

    file = write_pictures(tmp_path / "data", 8)
    options = {**OPTIONS, "iters": 0, "dataset": str(file), "extra_data_dir": str(tmp_path / "data" / "pictures")}
    AutoRound(str(folder), **options).quantize_and_save(tmp_path / "streamed")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    rounder = AutoRoundMLLM(model, processor.tokenizer, processor, template="llava", truncation=False, **options)
    rounder.quantize_and_save(tmp_path / "memory")
    streamed, memory = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "memory"))
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(tensor, memory[key]) for key, tensor in streamed.items())
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "memory").image_token == "<image>"


def test_conversations_that_are_too_long_say_how_long_they_are(folder, tmp_path):
    file = write_pictures(tmp_path / "data", 2)
    options = {**OPTIONS, "seqlen": 4, "dataset": str(file), "extra_data_dir": str(tmp_path / "data" / "pictures")}
    with pytest.raises(CalibrationError, match="longer than seqlen=4"):
        AutoRound(str(folder), **options).quantize()
