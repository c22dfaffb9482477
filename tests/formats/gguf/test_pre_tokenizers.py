"""Rules of splitting text and llama.cpp's names for them."""

import json

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from auto_round.errors import UnsupportedError
from auto_round.formats.gguf.pre_tokenizers import (
    CHINESE_JAPANESE,
    DEEPSEEK3,
    LLAMA3,
    O200K,
    QWEN2,
    TEKKEN,
    pre_tokenizer_name,
)


def name(*steps, ignore_merges=False, cleans_spaces=False, preferred=None):
    """Returns the name for some steps, written and read as in a tokenizer.json."""
    state = json.loads(Sequence(list(steps)).__getstate__())
    content = {"pre_tokenizer": state, "model": {"ignore_merges": ignore_merges}}
    return pre_tokenizer_name(content, cleans_spaces=cleans_spaces, preferred=preferred)


def split(pattern):
    return Split(Regex(pattern), "isolated")


BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
WHOLE = ByteLevel(add_prefix_space=False, use_regex=True)
# As the released models have them.
LLAMA_3_1 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_patterns_are_those_of_released_models():
    assert LLAMA3 == LLAMA_3_1
    assert QWEN2 == QWEN_2_5


def test_names_of_rules():
    assert name(split(LLAMA3), BYTES, ignore_merges=True) == "llama-bpe"
    assert name(split(LLAMA3), BYTES) == "dbrx"
    assert name(split(QWEN2), BYTES) == "qwen2"
    assert name(split(O200K), BYTES) == "gpt-4o"
    assert name(split(TEKKEN), BYTES) == "tekken"
    assert name(WHOLE) == "gpt-2"
    assert name(Digits(individual_digits=True), WHOLE) == "smollm"
    assert name(Digits(individual_digits=True), WHOLE, cleans_spaces=True) == "starcoder"
    assert name(split(r"\p{N}{1,3}"), split(CHINESE_JAPANESE), split(DEEPSEEK3), BYTES) == "deepseek-v3"
    assert name(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), BYTES) == "deepseek-coder"


def test_a_spelled_out_pattern_is_the_same():
    spelled = LLAMA3.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    assert name(split(spelled), BYTES) == "dbrx"


def test_a_preferred_name_is_taken_only_for_its_rules():
    assert name(split(LLAMA3), BYTES, ignore_merges=True, preferred="glm4") == "glm4"
    assert name(split(QWEN2), BYTES, preferred="glm4") == "qwen2"


def test_unknown_rules_are_refused():
    with pytest.raises(UnsupportedError, match="<Whitespace> then"):
        name(pre_tokenizers.Whitespace(), WHOLE)
    with pytest.raises(UnsupportedError, match="none"):
        name(BYTES)
