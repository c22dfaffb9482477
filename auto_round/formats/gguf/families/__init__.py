"""Architectures that GGUF export knows. One small file and one line here per family."""

from auto_round.formats.gguf.families import deepseek, gemma, gpt_oss, llama, phi3, plain, qwen
from auto_round.formats.gguf.families.base import GGUF_FAMILIES, GgufFamily, Place

__all__ = [
    "GGUF_FAMILIES",
    "GgufFamily",
    "Place",
    "deepseek",
    "gemma",
    "gpt_oss",
    "llama",
    "phi3",
    "plain",
    "qwen",
]
