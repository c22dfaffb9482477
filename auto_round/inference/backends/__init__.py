"""Backends: what runs a quantized layer. One file and one line here per backend."""

from auto_round.inference.backends import (
    gptqmodel_kernels,
    torch_any,
    torch_cpu_int4,
    torch_cuda_int4,
    torchao_intx,
    triton_int,
)
from auto_round.inference.backends.base import BACKENDS, Backend, all_backends, why_not

__all__ = [
    "BACKENDS",
    "Backend",
    "all_backends",
    "gptqmodel_kernels",
    "torch_any",
    "torch_cpu_int4",
    "torch_cuda_int4",
    "torchao_intx",
    "triton_int",
    "why_not",
]
