"""Models that are quantized already: their weights are dequantized as they are read, and are quantized anew."""

from auto_round.sources.open import open_source

__all__ = ["open_source"]
