"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json says.

llama.cpp has its own code for each way of splitting and knows them by name. The name is found from the rules
themselves, so that a vocabulary trained anew with known rules is recognized too. Source: llm_tokenizer_bpe and the
names below it in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from auto_round.errors import UnsupportedError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = _CONTRACTIONS + rf"|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}" + _REST
QWEN2 = _CONTRACTIONS + rf"|{_WORD}\p{{L}}+|\p{{N}}" + _REST
QWEN35 = _CONTRACTIONS + rf"|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}" + _REST.replace(r"\p{L}", r"\p{L}\p{M}")
O200K = f"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _LINES
TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _LINES
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace('\\"', '"')
CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
GPT2, DIGITS = "<GPT-2's pattern>", "<single digits>"


def pre_tokenizer_name(tokenizer: Mapping[str, Any], *, cleans_spaces: bool, preferred: str | None) -> str:
    """Returns the name for byte-level BPE.

    Args:
        tokenizer: content of a tokenizer.json.
        cleans_spaces: whether decoding removes spaces before punctuation, which hangs on the name in llama.cpp.
        preferred: the family's name, taken if the rules are those of several names and this is one.
    Raises:
        UnsupportedError: llama.cpp has no code for these rules.
    """
    rules = tuple(_rules(tokenizer.get("pre_tokenizer")))
    names = _names(rules, bool(tokenizer["model"].get("ignore_merges")), cleans_spaces)
    if not names:
        raise UnsupportedError(
            "gguf: llama.cpp has no pre-tokenizer with the rules of this tokenizer.json: "
            f"{' then '.join(rules) or 'none'}. Use --format auto_round, which keeps the tokenizer as it is"
        )
    return preferred if preferred in names else names[0]


def _names(rules: tuple[str, ...], whole_words: bool, cleans_spaces: bool) -> tuple[str, ...]:
    """Returns the names for some rules, the usual one first.

    Args:
        whole_words: a word that is in the vocabulary is taken without merging (`ignore_merges`).
    """
    if rules == (LLAMA3,):
        return ("llama-bpe", "falcon3", "glm4") if whole_words else ("dbrx", "smaug-bpe", "chatglm-bpe")
    if rules == (DIGITS, GPT2):
        return ("starcoder", "refact") if cleans_spaces else ("smollm", "command-r")
    if rules[:2] == ("[\r\n]", r"\s?\p{L}+"):
        return ("deepseek-coder",)
    if rules[:1] == ("[\r\n]",) and len(rules) > 1 and rules[1].startswith(r"\s?[A-Za-zµ"):
        return ("deepseek-llm",)
    known: dict[tuple[str, ...], tuple[str, ...]] = {
        (GPT2,): ("gpt-2", "phi-2", "olmo"),
        (QWEN2,): ("qwen2",),
        (QWEN35,): ("qwen35",),
        (O200K,): ("gpt-4o", "llama4"),
        (TEKKEN,): ("tekken",),
        (r"\p{N}{1,3}", CHINESE_JAPANESE, DEEPSEEK3): ("deepseek-v3",),
    }
    return known.get(rules, ())


def _rules(node: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields the patterns that split text, in order, those of other steps by a name in angle brackets."""
    kind = None if node is None else node["type"]
    if node is None or kind is None:
        return
    if kind == "Sequence":
        for child in node["pretokenizers"]:
            yield from _rules(child)
    elif kind == "Split":
        pattern = node["pattern"].get("Regex", node["pattern"].get("String", ""))
        yield pattern.replace(_CONTRACTIONS_SPELLED, _CONTRACTIONS)
    elif kind == "ByteLevel":
        if node.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield DIGITS if node.get("individual_digits") else "<digits>"
    else:
        yield f"<{kind}>"
