"""Layouts: how codes lie in memory. One file and one line here per layout."""

from auto_round.layouts import awq, compressed_int, float_scaled, gptq, mlx
from auto_round.layouts.base import LAYOUTS, Layout

__all__ = ["LAYOUTS", "Layout", "awq", "compressed_int", "float_scaled", "gptq", "mlx"]
