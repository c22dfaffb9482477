"""Backend "torch_cpu_int4": PyTorch's own int4 matrix product for CPUs, in bfloat16.

Memory: the operator wants its own packing, so a layer holds its weight twice (4 bits each) besides bfloat16 scales; the
checkpoint's tensors stay for `state_dict` and for calls that the operator does not serve.

Shape letters: O out features, I in features, G groups, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import DequantizeKernel, unpack_codes
from auto_round.inference.layer import QuantizedLinear

# Above this many tokens dequantizing wins. Measured on 4096 x 4096, one AVX-512 core: the operator takes 0.39 ms a
# token, bfloat16 linear 0.16 ms a token plus 15 ms for dequantizing.
MAX_TOKENS = 64


class CpuInt4Kernel(nn.Module):
    """Computes a layer with `_weight_int4pack_mm_for_cpu`, or by dequantizing where that is not possible or slower.

    Buffers (not saved): packed uint8, the operator's packing; scale_and_zero (G, O, 2) bfloat16, with the weight being
    (code - 8) * scale + zero; order_I int64, the input features sorted by group when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.dequantize = DequantizeKernel(layer)
        codes_OI = unpack_codes(layer, slice(0, layer.out_features))
        order_I = None
        if not layer.has_ordered_groups():
            order_I = torch.argsort(layer.g_idx, stable=True)
            codes_OI = codes_OI[:, order_I]
        self.register_buffer("order_I", order_I, persistent=False)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32).contiguous(), 1)
        self.register_buffer("packed", packed, persistent=False)
        scale_GO = layer.scales.float()
        zero_OG = self.dequantize.zero_OG
        zero_GO = torch.zeros_like(scale_GO) if zero_OG is None else (8 - zero_OG.t().float()) * scale_GO
        scale_and_zero = torch.stack([scale_GO, zero_GO], dim=-1).to(torch.bfloat16).contiguous()
        self.register_buffer("scale_and_zero", scale_and_zero, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        if not self._is_served(x):
            return self.dequantize(layer, x)
        rows_MI = x.reshape(-1, layer.in_features)
        if self.order_I is not None:
            rows_MI = rows_MI[:, self.order_I]
        y_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows_MI.contiguous(), self.packed, layer.spec.group_size, self.scale_and_zero
        )
        if layer.bias is not None:
            y_MO = y_MO + layer.bias.to(y_MO.dtype)
        return y_MO.reshape(*x.shape[:-1], layer.out_features)

    def _is_served(self, x: Tensor) -> bool:
        # Other dtypes run a scalar loop (37 ms instead of 1 ms); the operator has no gradient.
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        tokens = x.numel() // x.shape[-1]
        served = x.dtype == self.scale_and_zero.dtype == torch.bfloat16 and x.device.type == "cpu"
        return served and not needs_gradient and 0 < tokens <= MAX_TOKENS


register_backend(
    Backend(
        name="auto_round:torch_cpu_int4",
        aliases=("torch_cpu_int4",),
        prepare=CpuInt4Kernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"cpu"}),
        bits=frozenset({4}),
        group_sizes=frozenset({32, 64, 128, 256}),
        partial_groups=False,
        out_multiple=16,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.bfloat16}),
        priority=3,
    )
)
