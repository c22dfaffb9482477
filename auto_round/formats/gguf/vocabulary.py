"""The vocabulary of a GGUF file: tokens, their scores and kinds, merges, special tokens and the chat template.

Two kinds are read: SentencePiece (from tokenizer.model, or from the same vocabulary in a tokenizer.json) and byte-level
BPE. Special tokens and templates come through the `gguf` package's SpecialVocab.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.errors import UnsupportedError, require
from auto_round.formats.gguf.contents import gguf_package
from auto_round.formats.gguf.families import GgufFamily
from auto_round.formats.gguf.families.base import Value
from auto_round.formats.gguf.pre_tokenizers import pre_tokenizer_name

# Kinds of tokens in GGUF files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PIECE, UNUSED_SCORE, ADDED_SCORE = "▁", -10000.0, -1000.0
# Qwen's and others' marks of code infilling are control tokens though their files do not say so. DeepSeek's are written
# with a wide bar.
CONTROL_MARK = r"<[|\uff5c].*[|\uff5c]>"
OTHER_WAY = "Use --format auto_round, which keeps the tokenizer as it is"


@dataclasses.dataclass(slots=True)
class _Tokens:
    """Tokens by id while they are collected; empty places are filled at the end."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]

    @classmethod
    def empty(cls, size: int) -> _Tokens:
        return cls([f"[PAD{index}]" for index in range(size)], [UNUSED_SCORE] * size, [UNUSED] * size)

    def put(self, index: int, text: str, score: float, kind: int) -> None:
        """Sets a token; those that the model has no embedding for are left out."""
        if index < len(self.texts):
            self.texts[index], self.scores[index], self.kinds[index] = text, score, kind


def vocabulary_of(folder: Path, size: int, family: GgufFamily) -> dict[str, Value]:
    """Returns the keys below "tokenizer." that describe the tokenizer of a folder.

    Args:
        size: rows of the model's embedding; the vocabulary gets as many tokens.
    Raises:
        UnsupportedError: no tokenizer, or of a kind that llama.cpp does not have.
    """
    pieces, tokenizer = folder / "tokenizer.model", _json(folder / "tokenizer.json")
    if not pieces.is_file() and not tokenizer:
        raise UnsupportedError(
            f"gguf: {folder} has no tokenizer (tokenizer.json or tokenizer.model), and a GGUF file holds one. "
            "Put the tokenizer of the model beside it"
        )
    kind = tokenizer.get("model", {}).get("type")
    if tokenizer and _is_byte_level(tokenizer):
        found = _byte_level(tokenizer, size, family, _json(folder / "tokenizer_config.json"))
    elif pieces.is_file():
        found = _sentence_pieces(_from_model_file(pieces, size), tokenizer)
    elif kind == "BPE" and tokenizer["model"].get("byte_fallback"):
        found = _sentence_pieces(_from_merges(tokenizer, size), tokenizer)
    else:
        raise UnsupportedError(
            f"gguf: llama.cpp has no tokenizer of this kind (type {kind}; known: byte-level BPE, SentencePiece). "
            f"{OTHER_WAY}"
        )
    found = {f"ggml.{key}": value for key, value in (found | dict(family.vocabulary)).items()}
    return found | _special(folder, tokenizer, size)


def saved_tokenizer(tokenizer: Any, config: Any) -> tempfile.TemporaryDirectory:
    """Returns a temporary folder with the tokenizer and the config of a model in memory.

    Raises:
        UnsupportedError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UnsupportedError("gguf: a GGUF file holds the tokenizer, but none was given. Pass it beside the model")
    folder = tempfile.TemporaryDirectory(prefix="auto_round_tokenizer_")
    tokenizer.save_pretrained(folder.name)
    config.save_pretrained(folder.name)
    return folder


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return tokenizer["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _byte_level(
    tokenizer: Mapping[str, Any], size: int, family: GgufFamily, config: Mapping[str, Any]
) -> dict[str, Value]:
    tokens = _Tokens.empty(size)
    for text, index in tokenizer["model"]["vocab"].items():
        tokens.put(index, text, 0.0, NORMAL)
    _add_special(tokens, tokenizer)
    name = pre_tokenizer_name(
        tokenizer,
        cleans_spaces=bool(config.get("clean_up_tokenization_spaces")),
        preferred=family.pre_tokenizer,
    )
    return {"model": "gpt2", "pre": name, "tokens": tokens.texts, "token_type": tokens.kinds}


def _sentence_pieces(tokens: _Tokens, tokenizer: Mapping[str, Any]) -> dict[str, Value]:
    _add_special(tokens, tokenizer)
    found: dict[str, Value] = {"model": "llama", "pre": "default", "tokens": tokens.texts}
    found |= {"scores": tokens.scores, "token_type": tokens.kinds}
    before = tokenizer.get("pre_tokenizer") or {}
    prepends = "Prepend" in json.dumps(tokenizer.get("normalizer")) or before.get("prepend_scheme") in (
        "first",
        "always",
    )
    if tokenizer and not prepends:
        found["add_space_prefix"] = False
    return found


def _from_model_file(file: Path, size: int) -> _Tokens:
    require("sentencepiece", needed_for="reading tokenizer.model", install="'auto-round[gguf]'")
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(file))
    tokens = _Tokens.empty(size)
    kinds = ((processor.IsUnknown, UNKNOWN), (processor.IsControl, CONTROL), (processor.IsUnused, UNUSED))
    kinds += ((processor.IsByte, BYTE),)
    for index in range(processor.GetPieceSize()):
        kind = next((kind for is_kind, kind in kinds if is_kind(index)), NORMAL)
        tokens.put(index, processor.IdToPiece(index), processor.GetScore(index), kind)
    return tokens


def _from_merges(tokenizer: Mapping[str, Any], size: int) -> _Tokens:
    """Returns pieces with scores that make llama.cpp join them in the order of the merges of a tokenizer.json."""
    rank: dict[str, float] = {}
    for index, merge in enumerate(tokenizer["model"]["merges"]):
        rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), float(-index))
    last = -float(len(rank))
    tokens = _Tokens.empty(size)
    unknown = tokenizer["model"].get("unk_token")
    for text, index in tokenizer["model"]["vocab"].items():
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        kind = BYTE if is_byte else UNKNOWN if text == unknown else NORMAL
        tokens.put(index, text, rank.get(text, 0.0 if kind != NORMAL else last), kind)
    return tokens


def _add_special(tokens: _Tokens, tokenizer: Mapping[str, Any]) -> None:
    """Marks added tokens: control tokens, and others that are matched in text as they are."""
    for added in tokenizer.get("added_tokens", []):
        index, text = added["id"], added["content"]
        if index >= len(tokens.texts) or (tokens.texts[index] == text and tokens.kinds[index] in (UNKNOWN, CONTROL)):
            continue
        is_control = added.get("special") or re.fullmatch(CONTROL_MARK, text)
        score = tokens.scores[index] if tokens.texts[index] == text else ADDED_SCORE
        tokens.put(
            index, text if is_control else text.replace(PIECE, " "), score, CONTROL if is_control else USER_DEFINED
        )


def _special(folder: Path, tokenizer: Mapping[str, Any], size: int) -> dict[str, Value]:
    """Returns ids of special tokens, whether one is put before a text, merges and chat templates."""
    byte_level = bool(tokenizer) and _is_byte_level(tokenizer)
    special = gguf_package().SpecialVocab(folder, load_merges=byte_level, n_vocab=size)
    found: dict[str, Value] = {}
    if byte_level:
        found["ggml.merges"] = special.merges
    for name, index in special.special_token_ids.items():
        found[f"ggml.{ID_NAMES.get(name, name)}_token_id"] = index
    adds = {"bos": _puts_first(folder, special.special_token_ids.get("bos")), **special.add_special_token}
    found |= {f"ggml.add_{name}_token": value for name, value in adds.items() if value is not None}
    templates = special.chat_template
    if isinstance(templates, str):
        found["chat_template"] = templates
    elif templates:
        named = {one["name"]: one["template"] for one in templates}
        others = sorted(set(named) - {"default"})
        found |= {"chat_template": named["default"]} if "default" in named else {}
        found |= {f"chat_template.{name}": named[name] for name in others}
        found |= {"chat_templates": others} if others else {}
    return found


# Where the names of keys are not those of tokenizer_config.json.
ID_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def _puts_first(folder: Path, index: int | None) -> bool | None:
    """Returns whether the tokenizer puts the token of that id before a text; None if there is no telling."""
    file = folder / "tokenizer.json"
    if index is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(file)).encode("a").ids
    return bool(ids) and ids[0] == index


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
