"""Backends "ark" and "ark_xpu": the kernels of Intel's auto-round-lib (`import auto_round_kernel`), 2, 4 and 8 bits.

For 16-bit activations the library chooses ("auto"). On an Intel CPU with VNNI or AMX it rounds them to 8 bits for each
token and group (relative error 0.006), which is 3 to 4 times faster than its exact kernels and the fastest there is.
Everywhere else, and for asymmetric weights of 8 bits, it computes in float32; on processors of other makers with AVX2
code, slower than a bfloat16 layer from 8 tokens on. A model in float32 is always computed exactly. XPU (Intel GPUs,
symmetric only) is declared after the library's own sources and was not run.

Memory: a CPU layer holds only the library's packing, the weight's bits and a float32 scale a group.

Shape letters: O out features, I in features, G groups, M tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import ordered_codes, zero_points
from auto_round.inference.layer import QuantizedLinear, WeightKernel
from auto_round.inference.processor import is_intel_with_vnni

PRIORITY = 5
# Above dequantizing, below what PyTorch has for the processor.
PRIORITY_WITHOUT_INT8 = 1
# Scales from whose products with codes the codes are found again: neither overflow nor loss of bits.
SAFE_SCALES = (2.0**-100, 2.0**100)


class ArkKernel(nn.Module):
    """Computes a layer with `woqgemm`.

    Buffers (not saved): blob int8, the library's packing; scale_GO and zero_GO, what it was made of (int8 zero points
    less 2**(bits - 1)); order_I int64, the input features sorted by group when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        import auto_round_kernel

        self.kernels = auto_round_kernel
        self.spec = layer.spec
        # What the library multiplies with: a CPU kernel given other activations than float32 writes out of bounds.
        self.dtype = torch.float16 if layer.spec.device == "xpu" else torch.float32
        half = 2 ** (layer.spec.scheme.bits - 1)
        codes_OI, order_I = ordered_codes(layer)
        scale_GO = layer.scales.to(self.dtype).contiguous()
        zero_GO = torch.zeros_like(scale_GO, dtype=torch.int8)
        if not layer.spec.scheme.sym:
            zero_GO = (zero_points(layer).t() - half).contiguous().view(torch.int8)
        signed_IO = (codes_OI.t() - half).contiguous().view(torch.int8)
        blob = self.kernels.repack_quantized_weight(signed_IO, scale_GO, zero_GO, *self._settings())
        buffers = {"order_I": order_I, "blob": blob, "scale_GO": scale_GO, "zero_GO": zero_GO}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        x_MI = x.reshape(-1, layer.in_features).to(self.dtype)
        if self.order_I is not None:
            x_MI = x_MI[:, self.order_I]
        bias = None if layer.bias is None else layer.bias.to(self.dtype)
        if x_MI.shape[0] == 0 or (torch.is_grad_enabled() and x.requires_grad):
            y_MO = F.linear(x_MI, self._weight(), bias)
        else:
            y_MO = self._product(x_MI, x_MI.new_empty(0) if bias is None else bias)
        return y_MO.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)

    def _product(self, x_MI: Tensor, bias: Tensor) -> Tensor:
        group_size, *settings = self._settings()
        out_features, in_features = self.spec.shape
        return self.kernels.woqgemm(x_MI, self.blob, bias, out_features, in_features, group_size, *settings)

    def _weight(self) -> Tensor:
        """Returns (O, I) weights, input features in the kernel's order."""
        group_size, *settings = self._settings()
        out_features, in_features = self.spec.shape
        return self.kernels.unpack_weight(self.blob, self.dtype, out_features, in_features, group_size, *settings)

    def _settings(self) -> tuple[int, str, str, str, bool]:
        """Returns group size, type of the computation, of codes and of scales, and whether there are zero points."""
        scheme = self.spec.scheme
        compute, scales = "fp32" if self.spec.dtype == torch.float32 else "auto", "fp32"
        if self.spec.device == "xpu":
            compute, scales = "int8", "fp16"
        return self.spec.group_size, compute, f"int{scheme.bits}", scales, not scheme.sym


class ArkWeightKernel(ArkKernel, WeightKernel):
    """The same; finds the codes again from what the library unpacks, so that the layer need not hold them too."""

    def codes(self) -> Tensor:
        """Returns (O, I) uint8 codes, input features in the checkpoint's order."""
        weight_OGK = self._weight().unflatten(1, (self.scale_GO.shape[0], -1))
        signed_OGK = (weight_OGK / self.scale_GO.t()[..., None]).round_() + self.zero_GO.t()[..., None]
        codes_OI = (signed_OGK.flatten(1) + 2 ** (self.spec.scheme.bits - 1)).to(torch.uint8)
        return codes_OI if self.order_I is None else codes_OI[:, torch.argsort(self.order_I)]


def prepare_on_cpu(layer: QuantizedLinear) -> ArkKernel:
    """Returns the kernel of a layer, one that holds its codes if its scales allow that."""
    least, most = (float(bound) for bound in layer.scales.float().abs().aminmax())
    return ArkWeightKernel(layer) if SAFE_SCALES[0] < least <= most < SAFE_SCALES[1] else ArkKernel(layer)


CPU = Backend(
    name="auto_round_kernel:ark",
    aliases=("ark", "auto_round_kernel", "auto-round-lib"),
    prepare=prepare_on_cpu,
    layouts=frozenset({"gptq", "gptq_zp", "awq"}),
    devices=frozenset({"cpu"}),
    bits=frozenset({2, 4, 8}),
    partial_groups=False,
    sym=frozenset({True, False}),
    dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
    requires=("auto_round_kernel",),
    pip="auto-round-lib",
    brings="kernels for 2, 4 and 8 bits",
    priority=PRIORITY,
    priority_here=lambda: PRIORITY if is_intel_with_vnni() else PRIORITY_WITHOUT_INT8,
)
register_backend(CPU)
register_backend(
    dataclasses.replace(
        CPU,
        name="auto_round_kernel:ark_xpu",
        aliases=("ark_xpu",),
        prepare=ArkKernel,
        devices=frozenset({"xpu"}),
        sym=frozenset({True}),
        priority_here=None,
    )
)
