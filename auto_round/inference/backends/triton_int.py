"""Backend "auto_round:triton": Triton kernels for NVIDIA GPUs that multiply with the packed weight as it is stored.

Memory: beside the checkpoint's tensors a layer keeps one int32 for each group, 1/16 of a 4-bit weight in groups of 128,
and its zero points as bytes. Only groups out of order (desc_act) cost a second, sorted copy of the packed weight.

Few tokens run `multiply_kernel`, many `dequantize_kernel` and PyTorch's matrix product; see `triton_ops` for figures.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from auto_round.inference.backends.base import Backend, register_backend, why_not_this_gpu
from auto_round.inference.backends.torch_any import DequantizeKernel, ordered_codes
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.layouts.bit_pack import pack_bits

OLDEST_TRITON = (3, 5)


class TritonKernel(nn.Module):
    """Computes a layer with `torch.ops.auto_round.packed_linear`, or by dequantizing in PyTorch where it cannot run.

    Those are calls that need a gradient, in another dtype than float16 and bfloat16, or with tensors off the GPU.

    Buffers (not saved): grid (G, O) int32, see `triton_ops.grid_table`; order_I int64 and sorted (I * bits / 32, O)
    int32, the input features sorted by group and the weight packed in that order, when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        from auto_round.inference.triton_ops import INTERPRETED, TYPES, Packing, grid_table, packed_linear

        super().__init__()
        self.dequantize = DequantizeKernel(layer)
        self.is_interpreted = INTERPRETED
        self.packed_linear = packed_linear
        scheme = layer.spec.scheme
        # Scales that need float32 are rounded to the precision that weights have in PyTorch's product.
        scale = layer.scales.dtype if layer.scales.dtype in TYPES else layer.spec.dtype
        self.packing = Packing(scheme.bits, layer.spec.group_size, layer.spec.layout == "awq", scale)
        self.register_buffer("grid", grid_table(layer.scales, self.dequantize.zero_OG, self.packing), persistent=False)
        order_I = packed = None
        if not layer.has_ordered_groups():
            codes_OI, order_I = ordered_codes(layer)
            packed = pack_bits(codes_OI, scheme.bits).t()
        self.register_buffer("order_I", order_I, persistent=False)
        self.register_buffer("sorted", packed, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        if not self._is_served(x):
            return self.dequantize(layer, x)
        # Generating one token is bound by what happens on the host: attributes of modules cost a microsecond each,
        # PyTorch's dispatcher six.
        mine, stored = self._buffers, layer._buffers
        words, bias = stored["qweight"], layer.bias if layer.spec.bias else None
        if mine["order_I"] is not None:
            words, x = mine["sorted"], x[..., mine["order_I"]]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        is_traced = torch.compiler.is_compiling() or type(x) is not Tensor
        run = torch.ops.auto_round.packed_linear if is_traced else self.packed_linear
        return run(x, words, mine["grid"], bias, *self.packing)

    def _is_served(self, x: Tensor) -> bool:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        is_here = x.device == self._buffers["grid"].device and (x.is_cuda or self.is_interpreted)
        return is_here and x.dtype in (torch.float16, torch.bfloat16) and not needs_gradient


def _refuses(spec: LayerSpec) -> str | None:
    if importlib.util.find_spec("triton") is not None:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
            return f"needs triton 3.5 or later, here is {triton.__version__} (it comes with PyTorch 2.9)"
    multiple = 32 if spec.scheme.bits == 3 else 16
    if spec.group_size % multiple:
        return f"group_size={spec.group_size} is no multiple of {multiple}"
    return why_not_this_gpu(spec)


register_backend(
    Backend(
        name="auto_round:triton",
        aliases=("triton", "auto_round:tritonv2", "tritonv2"),
        prepare=TritonKernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"cuda"}),
        bits=frozenset({2, 3, 4, 8}),
        partial_groups=False,
        in_multiple=32,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        requires=("triton",),
        refuses=_refuses,
        priority=4,
    )
)
