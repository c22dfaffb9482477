"""Vocabularies: tokens, kinds, scores, special tokens and templates as llama.cpp reads them."""

import json

import pytest
from tokenizers import Tokenizer, models

from auto_round.errors import UnsupportedError
from auto_round.formats.gguf.families import GGUF_FAMILIES
from auto_round.formats.gguf.pre_tokenizers import LLAMA3, QWEN2
from auto_round.formats.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of

from .conftest import byte_level_tokenizer, piece_tokenizer, save_tokenizer

pytest.importorskip("gguf")


def read(tokenizer, folder, size=300, family="qwen2", **options):
    save_tokenizer(tokenizer, folder, **options)
    return vocabulary_of(folder, size, GGUF_FAMILIES[family])


def test_byte_level_tokens_and_merges(tmp_path):
    found = read(byte_level_tokenizer(QWEN2), tmp_path)
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "qwen2")
    assert found["ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found["ggml.token_type"][:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert found["ggml.merges"][0] == "t h"
    assert (found["ggml.bos_token_id"], found["ggml.eos_token_id"], found["ggml.unknown_token_id"]) == (1, 2, 0)
    assert found["ggml.add_bos_token"] is False


def test_places_without_a_token_are_filled_and_tokens_without_a_row_left_out(tmp_path):
    found = read(byte_level_tokenizer(), tmp_path, size=300)
    assert len(found["ggml.tokens"]) == 300
    assert (found["ggml.tokens"][-1], found["ggml.token_type"][-1]) == ("[PAD299]", UNUSED)
    assert len(read(byte_level_tokenizer(), tmp_path, size=200)["ggml.tokens"]) == 200


def test_added_tokens_are_control_tokens_or_matched_as_text(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<tool>", "<|fim_prefix|>"])
    found = read(tokenizer, tmp_path)
    kinds = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert (kinds["<tool>"], kinds["<|fim_prefix|>"]) == (USER_DEFINED, CONTROL)


def test_a_token_before_each_text_is_told(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert read(tokenizer, tmp_path)["ggml.add_bos_token"] is True


def test_chat_templates_travel(tmp_path):
    save_tokenizer(byte_level_tokenizer(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert vocabulary_of(tmp_path, 300, GGUF_FAMILIES["qwen2"])["chat_template"] == "{{ messages }}"
    file = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))
    found = vocabulary_of(tmp_path, 300, GGUF_FAMILIES["qwen2"])
    assert (found["chat_template"], found["chat_template.tool_use"], found["chat_templates"]) == (
        "a",
        "b",
        ["tool_use"],
    )


def test_pieces_get_scores_in_the_order_of_merges(tmp_path):
    found = read(piece_tokenizer(), tmp_path, family="llama")
    assert (found["ggml.model"], found["ggml.pre"]) == ("llama", "default")
    score = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    assert score["th"] > score["in"] > score["the"] > score["▁the"] > score["a"] > score["[PAD299]"]
    kinds = found["ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[3], kinds[-1]) == (UNKNOWN, CONTROL, BYTE, UNUSED)
    assert "ggml.add_space_prefix" not in found


def test_pieces_without_a_space_before_a_text_say_so(tmp_path):
    tokenizer = piece_tokenizer()
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    assert read(tokenizer, tmp_path, family="llama")["ggml.add_space_prefix"] is False


def test_a_sentencepiece_file_is_read_as_it_is(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = iter(["the king is in the house", "a thing and another thing", "where there is a will"] * 20)
    options = {"vocab_size": 300, "byte_fallback": True, "model_type": "bpe", "hard_vocab_limit": False}
    spm.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=str(tmp_path / "tokenizer"), **options)
    processor = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = vocabulary_of(tmp_path, 330, GGUF_FAMILIES["gemma2"])
    count = processor.GetPieceSize()
    assert found["ggml.tokens"][:count] == [processor.IdToPiece(index) for index in range(count)]
    assert found["ggml.scores"][:count] == [processor.GetScore(index) for index in range(count)]
    assert found["ggml.token_type"][:5] == [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE]
    assert found["ggml.add_space_prefix"] is False  # Gemma's


def test_a_family_chooses_among_names_of_the_same_rules(tmp_path):
    tokenizer = byte_level_tokenizer(LLAMA3, ignore_merges=True)
    assert read(tokenizer, tmp_path, family="llama")["ggml.pre"] == "llama-bpe"
    assert read(tokenizer, tmp_path, family="glm4")["ggml.pre"] == "glm4"


def test_what_llama_cpp_cannot_tokenize_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="has no tokenizer"):
        vocabulary_of(tmp_path, 300, GGUF_FAMILIES["llama"])
    with pytest.raises(UnsupportedError, match=r"no pre-tokenizer with the rules.*: \\s"):
        read(byte_level_tokenizer(r"\s"), tmp_path)
    with pytest.raises(UnsupportedError, match=r"type WordLevel; known"):
        read(Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), tmp_path)
