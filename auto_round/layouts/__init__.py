"""Layouts: how codes lie in memory. One file and one line here per layout."""

from auto_round.layouts import (
    awq,
    compressed_int,
    float_scaled,
    fp8_flat,
    gguf_blocks,
    gguf_superblocks,
    gptq,
    mlx,
    mxint4,
)
from auto_round.layouts.base import LAYOUTS, Layout

__all__ = [
    "LAYOUTS",
    "Layout",
    "awq",
    "compressed_int",
    "float_scaled",
    "fp8_flat",
    "gguf_blocks",
    "gguf_superblocks",
    "gptq",
    "mlx",
    "mxint4",
]
