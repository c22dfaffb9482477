"""GGUF files. `families/` has one small file per architecture, `mixes.py` says which tensor takes which type."""

from auto_round.formats.gguf import format

__all__ = ["format"]
