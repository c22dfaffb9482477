"""Backend "torchao": the weight as TorchAO's `IntxUnpackedToInt8Tensor`, for `torch.compile`, export and TorchAO users.

The layer's kernel holds the weight as a tensor that `F.linear` and TorchAO's own transformations understand
(`layer.kernel.weight`): a signed byte for each weight of 2 to 8 bits, a scale and a zero point for each group. In eager
mode it is dequantized on every call, so "auto" never chooses it. Written against TorchAO 0.18.

Memory: one byte a weight beside the checkpoint's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import DequantizeKernel, unpack_codes
from auto_round.inference.layer import QuantizedLinear


class TorchaoKernel(nn.Module):
    """Computes a layer with TorchAO's tensor, or by dequantizing for another dtype than the layer's.

    Buffer (not saved): weight (O, I), in the layer's dtype for whoever looks at it.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        super().__init__()
        self.dequantize = DequantizeKernel(layer)
        bits, dtype = layer.spec.scheme.bits, layer.spec.dtype
        middle = 2 ** (bits - 1)
        codes_OI = unpack_codes(layer, slice(0, layer.out_features)).to(torch.int16) - middle
        scale_OG = layer.scales.t().to(dtype).contiguous()
        zero_OG = torch.zeros_like(scale_OG, dtype=torch.int8)
        if self.dequantize.zero_OG is not None:
            zero_OG = (self.dequantize.zero_OG.to(torch.int16) - middle).to(torch.int8)
        weight = IntxUnpackedToInt8Tensor(
            qdata=codes_OI.to(torch.int8),
            scale=scale_OG,
            zero_point=zero_OG,
            target_dtype=getattr(torch, f"int{bits}"),
            block_size=(1, layer.spec.group_size),
            dtype=dtype,
            activation_quantization=None,
        )
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        if x.dtype != self.weight.dtype:
            return self.dequantize(layer, x)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, self.weight, bias)


register_backend(
    Backend(
        name="torchao",
        prepare=TorchaoKernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"cpu", "cuda"}),
        bits=frozenset(range(2, 9)),
        partial_groups=False,
        act_order=False,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        requires=("torchao",),
        priority=-1,
    )
)
