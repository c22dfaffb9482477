"""Backend "torch_fp8": FP8 weights times FP8 activations with PyTorch's scaled matrix product, on GPUs that have FP8.

Products of E4M3 numbers are summed in float32, so what differs from the backend "torch" is that activations and weights
are not rounded to the model's precision in between. CPUs have the operator too, but without AMX-FP8 it is slow: 4096 x
4096 took 254 ms for a token on one AVX-512 core, dequantizing 20 ms.

Shape letters: O out features, I in features, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.data_types.activations import SMALLEST
from auto_round.elements import E4M3
from auto_round.inference.backends.base import Backend, register_backend, why_not_this_gpu
from auto_round.inference.dequantize import RowKernel
from auto_round.inference.input_quantization import QuantizedInput
from auto_round.inference.layer import QuantizedLinear
from auto_round.schemes import ActivationScheme

CAPABILITY = (8, 9)  # the first with FP8 tensor cores


class Fp8Kernel(nn.Module):
    """Computes a layer with `torch._scaled_mm`; what that does not serve (gradients) goes through plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = QuantizedInput(RowKernel())

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        if not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
            return self.plain(layer, x)
        x_MI = x.reshape(-1, layer.in_features)
        codes_MI, scale_M1 = quantize_to_fp8(x_MI.float(), layer)
        scale_1O = layer.weight_scale.float().view(1, -1).expand(1, layer.out_features).contiguous()
        y_MO = scaled_product(codes_MI, layer.weight, scale_M1, scale_1O, dtype=x.dtype)
        if layer.bias is not None:
            y_MO = y_MO + layer.bias.to(y_MO.dtype)
        return y_MO.reshape(*x.shape[:-1], layer.out_features)


def quantize_to_fp8(x_MI: Tensor, layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Returns (M, I) float8_e4m3fn and (M, 1) float32 scales of float32 activations, by the layer's scheme."""
    activation = layer.spec.scheme.activation
    assert activation is not None
    # As a tensor: PyTorch multiplies with the inverse of a number on a GPU, which gives other codes at ties.
    largest = x_MI.new_full((), E4M3.largest)
    if not activation.dynamic:
        scale_M1 = layer.input_scale.float().expand(x_MI.shape[0], 1)
    elif activation.group_size == 0:
        scale_M1 = (x_MI.abs().amax() / largest).expand(x_MI.shape[0], 1)
    else:
        scale_M1 = x_MI.abs().amax(-1, keepdim=True) / largest
    scale_M1 = scale_M1.clamp(min=SMALLEST)
    return (x_MI / scale_M1).clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn), scale_M1


def scaled_product(
    codes_MI: Tensor, weight_OI: Tensor, scale_M1: Tensor, scale_1O: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Returns (M, O) products in `dtype`, each row and column times its scale."""
    if dtype == torch.bfloat16:
        return torch._scaled_mm(codes_MI, weight_OI.t(), scale_a=scale_M1, scale_b=scale_1O, out_dtype=dtype)
    # Scales of rows go with bfloat16 results only.
    one = torch.ones((), device=codes_MI.device)
    sums_MO = torch._scaled_mm(codes_MI, weight_OI.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return (sums_MO * scale_M1 * scale_1O).to(dtype)


register_backend(
    Backend(
        name="auto_round:torch_fp8",
        aliases=("torch_fp8",),
        prepare=lambda layer: Fp8Kernel(),  # noqa: ARG005
        layouts=frozenset({"fp8", "fp8_flat"}),
        devices=frozenset({"cuda"}),
        bits=frozenset({8}),
        sym=frozenset({True}),
        data_types=frozenset({"fp"}),
        activations=frozenset(
            ActivationScheme(data_type="fp", bits=8, group_size=size, sym=True, dynamic=dynamic)
            for size, dynamic in ((-1, True), (0, True), (0, False))
        ),
        group_sizes=frozenset({-1, 0}),
        act_order=False,
        in_multiple=16,
        out_multiple=16,
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        refuses=lambda spec: why_not_this_gpu(spec, CAPABILITY),
        priority=5,
    )
)
