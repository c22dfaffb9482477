"""Backends "gptqmodel:...": the kernels of the GPTQModel package, made from a loaded layer's tensors.

Written against gptqmodel 7.6. `gptqmodel:torch` runs in the tests, on a CPU. `gptqmodel:marlin`, `gptqmodel:exllamav2`
and `gptqmodel:awq` need an NVIDIA GPU and the CUDA extensions that gptqmodel builds when they are first used; they have
been constructed from its source, but NOT been run. None is chosen by "auto"; they have to be named.

Memory: GPTQModel's modules want tensors in their own order, so a layer holds its weight twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import UnsupportedError
from auto_round.inference.backends.base import Backend, register_backend, why_not_this_gpu
from auto_round.inference.backends.torch_any import DequantizeKernel, zero_points
from auto_round.inference.bit_unpack import AWQ_SHIFTS
from auto_round.inference.layer import QuantizedLinear
from auto_round.layouts.bit_pack import pack_bits

# Scratch memory that layers on one device share, as GPTQModel's own loader arranges it.
_SCRATCH: dict[torch.device, list[Any]] = {}


class GptqmodelKernel(nn.Module):
    """Computes a layer with a module of GPTQModel; gradients and other dtypes than the layer's by dequantizing.

    The module's tensors are non-persistent buffers, so that `state_dict` has the checkpoint's alone.
    """

    def __init__(self, layer: QuantizedLinear, module: nn.Module) -> None:
        super().__init__()
        self.dequantize = DequantizeKernel(layer)
        self.module = _without_state(module.eval())

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient or x.dtype != layer.spec.dtype:
            return self.dequantize(layer, x)
        return self.module(x)


def _prepare_torch(layer: QuantizedLinear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    module = TorchLinear(**_arguments(layer), register_buffers=True)
    _fill(module, layer, layer.spec.dtype)
    module.optimized = True  # else it compiles a function of each layer, which takes a C++ compiler and minutes
    module.post_init()
    return GptqmodelKernel(layer, module)


def _prepare_marlin(layer: QuantizedLinear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    module = MarlinLinear(**_arguments(layer)).to(layer.qweight.device)
    _fill(module, layer, layer.spec.dtype)
    module.post_init()
    return GptqmodelKernel(layer, module)


def _prepare_exllamav2(layer: QuantizedLinear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear, ScratchSpace

    module = ExllamaV2Linear(**_arguments(layer), register_buffers=True)
    _fill(module, layer, torch.float16)
    scratches = _SCRATCH.setdefault(layer.qweight.device, [])
    wanted = module.scratch_space_fixed()
    if not scratches or scratches[-1].scratch_bytes < wanted:
        scratches.append(ScratchSpace(wanted, layer.qweight.device))
    module.post_init(scratches[-1])
    return GptqmodelKernel(layer, module)


def _prepare_awq(layer: QuantizedLinear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.gemm_awq import AwqGEMMLinear

    module = AwqGEMMLinear(**_arguments(layer), register_buffers=True)
    zeros = layer.qzeros.contiguous()
    if layer.spec.scheme.sym:
        middle = functools.reduce(int.__or__, (8 << shift for shift in AWQ_SHIFTS))
        zeros = torch.full_like(zeros, middle - 2**32)  # as a signed word
    _set(module, qweight=layer.qweight.contiguous(), qzeros=zeros, scales=layer.scales.to(layer.spec.dtype))
    _set(module, bias=layer.bias)
    module.post_init()
    return GptqmodelKernel(layer, module)


def _arguments(layer: QuantizedLinear) -> dict[str, Any]:
    """Returns the arguments that all constructors of GPTQModel's modules take."""
    spec = layer.spec
    return {
        "bits": spec.scheme.bits,
        "group_size": spec.scheme.group_size,
        "sym": spec.scheme.sym,
        "desc_act": not layer.has_ordered_groups(),
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "bias": spec.bias,
        "dtype": spec.dtype,
    }


def _fill(module: nn.Module, layer: QuantizedLinear, scale_dtype: torch.dtype) -> None:
    """Gives a GPTQ module its tensors, zero points in the second version of the format (stored as they are)."""
    bits = layer.spec.scheme.bits
    if layer.spec.scheme.sym:
        zero_GO = torch.full_like(layer.scales, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero_GO = zero_points(layer).t().contiguous()
    if int(zero_GO.max()) >= 2**bits:
        raise UnsupportedError(
            f"{layer.spec.name}: gptqmodel cannot hold the zero point {2**bits}. Use backend='torch'"
        )
    groups = layer.sequential_groups() if layer.has_ordered_groups() else layer.g_idx
    _set(module, qweight=layer.qweight.contiguous(), scales=layer.scales.to(scale_dtype).contiguous())
    _set(module, qzeros=pack_bits(zero_GO, bits), g_idx=groups.int(), bias=layer.bias)


def _set(module: nn.Module, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if isinstance(getattr(module, name), nn.Parameter):
            getattr(module, name).data = tensor
        else:
            setattr(module, name, tensor)


def _without_state(module: nn.Module) -> nn.Module:
    """Makes every parameter and buffer of a module a non-persistent buffer, in place."""
    for part in module.modules():
        tensors = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            delattr(part, name)
            part.register_buffer(name, tensor.data, persistent=False)
    return module


def _register(name: str, prepare: Callable[[QuantizedLinear], nn.Module], **declared: Any) -> None:
    sixteen_bits = frozenset({torch.float16, torch.bfloat16})
    common = {"sym": frozenset({True, False}), "dtypes": sixteen_bits, "partial_groups": False, "priority": -1}
    common |= {"requires": ("gptqmodel",), "devices": frozenset({"cuda"}), "refuses": why_not_this_gpu}
    common |= {"layouts": frozenset({"gptq", "gptq_zp"}), "group_sizes": frozenset({-1, 32, 64, 128})}
    register_backend(Backend(name=f"gptqmodel:{name}", prepare=prepare, **{**common, **declared}))


# Declared as GPTQModel's classes do, and narrower where their kernels' tiles want it.
_register(
    "marlin",
    _prepare_marlin,
    aliases=("marlin", "gptqmodel:marlin_zp"),
    bits=frozenset({4, 8}),
    sym=frozenset({True}),
    in_multiple=128,
    out_multiple=64,
)
_register(
    "exllamav2",
    _prepare_exllamav2,
    aliases=("exllamav2",),
    bits=frozenset({4}),
    # It computes in float16 whatever it is given, which bfloat16 activations may overflow.
    dtypes=frozenset({torch.float16}),
    in_multiple=32,
    out_multiple=32,
)
_register(
    "awq",
    _prepare_awq,
    layouts=frozenset({"awq"}),
    bits=frozenset({4}),
    in_multiple=32,
    out_multiple=128,
    act_order=False,
)
_register(
    "torch",
    _prepare_torch,
    devices=frozenset({"cpu", "cuda"}),
    bits=frozenset({2, 3, 4, 8}),
    group_sizes=frozenset({-1, 16, 32, 64, 128, 256, 512, 1024}),
    in_multiple=32,
    out_multiple=32,
    refuses=None,
)
