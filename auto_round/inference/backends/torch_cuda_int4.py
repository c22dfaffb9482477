"""Backend "auto_round:torch_cuda_int4": PyTorch's own int4 matrix product for NVIDIA GPUs ("tinygemm"), in bfloat16.

Memory: the operator wants its own packing, so a layer holds its weight twice (4 bits each) besides bfloat16 scales; the
checkpoint's tensors stay for `state_dict` and for calls that the operator does not serve.

Shape letters: O out features, I in features, G groups, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.inference.backends.base import Backend, register_backend, why_not_this_gpu
from auto_round.inference.backends.torch_any import DequantizeKernel, by_rows, ordered_codes
from auto_round.inference.layer import QuantizedLinear

# Tiles of 16 input features that the packing puts together; 8 is the largest and asks for a multiple of 128.
INNER_TILES = 8
# Above this many tokens dequantizing wins. Measured on an H200, 4096 x 4096: the operator takes 155 us for 128 tokens
# and 2.3 ms for 2048, dequantizing in PyTorch 234 us besides a product of 13 to 90 us.
MAX_TOKENS = 128


class CudaInt4Kernel(nn.Module):
    """Computes a layer with `_weight_int4pack_mm`, or by dequantizing where that is not possible or slower.

    Buffers (not saved): packed int32, the operator's packing; scale_and_zero (G, O, 2) bfloat16, with the weight being
    (code - 8) * scale + zero; order_I int64, the input features sorted by group when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.dequantize = DequantizeKernel(layer)
        codes_OI, order_I = ordered_codes(layer)
        self.register_buffer("order_I", order_I, persistent=False)
        pairs = codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), INNER_TILES)
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
        size = layer.spec.group_size

        def product(x_MI: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x_MI.contiguous(), self.packed, size, self.scale_and_zero)

        return by_rows(layer, x, self.order_I, product)

    def _is_served(self, x: Tensor) -> bool:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        tokens = x.numel() // x.shape[-1]
        served = x.dtype == self.scale_and_zero.dtype == torch.bfloat16 and x.device == self.packed.device
        return served and not needs_gradient and 0 < tokens <= MAX_TOKENS


register_backend(
    Backend(
        name="auto_round:torch_cuda_int4",
        aliases=("torch_cuda_int4", "tinygemm"),
        prepare=CudaInt4Kernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"cuda"}),
        bits=frozenset({4}),
        group_sizes=frozenset({32, 64, 128, 256}),
        partial_groups=False,
        in_multiple=16 * INNER_TILES,
        out_multiple=8,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.bfloat16}),
        refuses=why_not_this_gpu,
        priority=2,
    )
)
