"""Backends: what runs a quantized layer. One file and one line here per backend."""

from auto_round.inference.backends import torch_any, torch_cpu_int4, torch_fp8, torch_int8
from auto_round.inference.backends.base import BACKENDS, Backend, all_backends, why_not

__all__ = ["BACKENDS", "Backend", "all_backends", "torch_any", "torch_cpu_int4", "torch_fp8", "torch_int8", "why_not"]
