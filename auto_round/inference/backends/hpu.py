"""Backend "hpu": 4 bits on Intel Gaudi, dequantized by Gaudi's own operator on every call.

It could not be run where it was written: only the tensors that the operator is given are tested. Their form is that of
the operator's other users (AutoAWQ's and neural-compressor's Gaudi layers): codes of one input feature lie along the
output, eight in a word, lowest bits first.

Shape letters: O out features, I in features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.errors import UnsupportedError
from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import ordered_codes, zero_points
from auto_round.inference.bit_unpack import pack_rows, unpack_rows
from auto_round.inference.layer import QuantizedLinear, WeightKernel


class HpuKernel(WeightKernel):
    """Computes a layer with `convert_from_uint4` and a matrix product.

    Buffers (not saved): words_IW int32 (I, O / 8) codes, zero_words_GW int32 (G, O / 8) zero points, scale_GO in the
    dtype of the activations; order_I int64, the input features sorted by group when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        codes_OI, order_I = ordered_codes(layer)
        if layer.spec.scheme.sym:
            zero_GO = torch.full_like(layer.scales, 2 ** (layer.spec.scheme.bits - 1), dtype=torch.uint8)
        else:
            zero_GO = zero_points(layer).t()
            if int(zero_GO.max()) > 15:
                raise UnsupportedError(f"{layer.spec.name}: zero points above 15 do not fit into Gaudi's 4 bits")
        buffers = {
            "order_I": order_I,
            "words_IW": pack_rows(codes_OI.t().contiguous(), 4),
            "zero_words_GW": pack_rows(zero_GO.contiguous(), 4),
            "scale_GO": layer.scales.to(layer.spec.dtype).contiguous(),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        import habana_frameworks.torch  # noqa: F401  (registers the operator)

        weight_IO = torch.ops.hpu.convert_from_uint4(self.words_IW, self.scale_GO, self.zero_words_GW, x.dtype)
        y = (x if self.order_I is None else x[..., self.order_I]) @ weight_IO
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def codes(self) -> Tensor:
        """Returns (O, I) uint8 codes, input features in the checkpoint's order."""
        codes_IO = unpack_rows(self.words_IW, 4)
        if self.order_I is not None:
            codes_IO = codes_IO[torch.argsort(self.order_I)]
        return codes_IO.t().contiguous()


register_backend(
    Backend(
        name="auto_round:hpu",
        aliases=("hpu",),
        prepare=HpuKernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"hpu"}),
        bits=frozenset({4}),
        partial_groups=False,
        out_multiple=8,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.bfloat16}),
        requires=("habana_frameworks",),
        pip="habana-torch-plugin",
        brings="Gaudi's own 4-bit operator",
        priority=3,
    )
)
