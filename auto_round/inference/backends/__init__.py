"""Backends: what runs a quantized layer. One file and one line here per backend."""

from auto_round.inference.backends import (
    ark,
    gptqmodel_kernels,
    hpu,
    torch_any,
    torch_cpu_int4,
    torch_cpu_int8,
    torch_cuda_int4,
    torchao_intx,
    triton_int,
)
from auto_round.inference.backends.base import BACKENDS, Backend, why_not
from auto_round.inference.backends.catalogue import all_backends, backend_named

__all__ = [
    "BACKENDS",
    "Backend",
    "all_backends",
    "ark",
    "backend_named",
    "gptqmodel_kernels",
    "hpu",
    "torch_any",
    "torch_cpu_int4",
    "torch_cpu_int8",
    "torch_cuda_int4",
    "torchao_intx",
    "triton_int",
    "why_not",
]
