"""Backend "torch_int8": 8-bit weights times 8-bit activations (INT8_W8A8) with PyTorch's integer matrix product.

Sums are exact 32-bit integers, so what differs from the backend "torch" is that activations and weights are not rounded
to the model's precision in between.

Shape letters: O out features, I in features, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.data_types.activations import SMALLEST
from auto_round.inference.backends.base import Backend, register_backend, why_not_this_gpu
from auto_round.inference.dequantize import RowKernel
from auto_round.inference.input_quantization import QuantizedInput
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.inference.processor import has_int8_dot_product
from auto_round.schemes import ActivationScheme

LARGEST = 127
# Up to so many tokens are multiplied one by one on a CPU. Measured on one AVX-512-VNNI core, 4096 x 4096: 0.5 ms each;
# 4 tokens together 2.9 ms, 16 3.8 ms (bfloat16 F.linear: 3.9 ms for one, 5.8 for 16).
MOST_ONE_BY_ONE = 4
# The operator refuses fewer rows on CUDA.
LEAST_ROWS_ON_CUDA = 17
CAPABILITY = (7, 5)  # the first with 8-bit integer tensor cores


class Int8Kernel(nn.Module):
    """Computes a layer with `torch._int_mm`; what that does not serve (gradients) goes through plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = QuantizedInput(RowKernel())

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        if not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
            return self.plain(layer, x)
        x_MI = x.reshape(-1, layer.in_features).float()
        scale_M1 = input_scale(x_MI, layer)
        codes_MI = (x_MI / scale_M1).round_().clamp_(-LARGEST - 1, LARGEST).to(torch.int8)
        y_MO = integer_product(codes_MI, layer.weight).mul_(scale_M1).mul_(layer.weight_scale.float().view(1, -1))
        if layer.bias is not None:
            y_MO.add_(layer.bias)
        return y_MO.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)


def input_scale(x_MI: Tensor, layer: QuantizedLinear) -> Tensor:
    """Returns the float32 scale of each token, (M, 1), or of all, (1, 1)."""
    activation = layer.spec.scheme.activation
    assert activation is not None
    if not activation.dynamic:
        return layer.input_scale.float().view(1, 1).clamp(min=SMALLEST)
    dims = (0, 1) if activation.group_size == 0 else 1
    return (x_MI.abs().amax(dims, keepdim=True) / LARGEST).clamp_(min=SMALLEST)


def integer_product(codes_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """Returns (M, O) float32 products of int8 matrices."""
    tokens, weight_IO = codes_MI.shape[0], weight_OI.t()
    if codes_MI.device.type != "cpu":
        missing = max(LEAST_ROWS_ON_CUDA - tokens, 0)
        padded = torch.nn.functional.pad(codes_MI, (0, 0, 0, missing))
        return torch._int_mm(padded, weight_IO)[:tokens].float()
    if tokens <= MOST_ONE_BY_ONE:
        return torch.cat([torch._int_mm(code_1I, weight_IO) for code_1I in codes_MI.split(1)]).float()
    # With the weight on the left the operator need not reorder it: a third to a half of the time.
    return torch._int_mm(weight_OI, codes_MI.t()).t().to(torch.float32, memory_format=torch.contiguous_format)


def why_not_here(spec: LayerSpec) -> str | None:
    """Returns why this machine cannot multiply 8-bit integers, or None."""
    if spec.device == "cpu":
        return None if has_int8_dot_product() else "needs a processor with AVX512-VNNI"
    return why_not_this_gpu(spec, CAPABILITY)


register_backend(
    Backend(
        name="auto_round:torch_int8",
        aliases=("torch_int8",),
        prepare=lambda layer: Int8Kernel(),  # noqa: ARG005
        layouts=frozenset({"ct_int8"}),
        devices=frozenset({"cpu", "cuda"}),
        bits=frozenset({8}),
        sym=frozenset({True}),
        activations=frozenset(
            ActivationScheme(data_type="int", bits=8, group_size=size, sym=True, dynamic=dynamic)
            for size, dynamic in ((-1, True), (0, True), (0, False))
        ),
        group_sizes=frozenset({-1}),
        act_order=False,
        in_multiple=8,
        out_multiple=8,
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        refuses=why_not_here,
        priority=5,
    )
)
