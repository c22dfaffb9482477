"""Backend "torch_cpu_int4": 2 to 4 bits on a CPU with PyTorch alone.

A few tokens go through PyTorch's int4 operator in bfloat16. For more, where it is slower than a plain bfloat16 layer,
activations are rounded to 8 bits for each token and group of features (0.6 % relative error for normally distributed
ones, as llama.cpp and auto-round-lib do) and multiplied as integers, if the processor has VNNI. What neither serves
(gradients, no VNNI, many tokens with small groups) is dequantized exactly. `backend="torch"` is exact always.

Memory: both packings have 4 bits a weight, whatever its width, so a layer takes 8 bits a weight besides scales. The
checkpoint's own packing is given up and made again when it is asked for.

Shape letters: O out features, I in features, G groups, K group size, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import by_rows, ordered_codes, zero_points
from auto_round.inference.int8_product import int8_linear, tile_widths
from auto_round.inference.layer import QuantizedLinear, WeightKernel
from auto_round.inference.nibbles import FACTOR, NibbleTile, pack_nibbles, tiles_of
from auto_round.inference.processor import has_int8_dot_product

# Group size of the kernel -> tokens that the int4 operator takes. Measured on one AVX-512 core (Zen 4), 4096 x 4096: it
# needs 0.39 ms a token; integer products need 3.9 ms for 9 tokens and groups of 128, 5.9 for 16 and groups of 64, 24
# for 64 and groups of 32; bfloat16 F.linear 3.9, 4.9 and 12.
MOST_FOR_OPERATOR = {128: 8, 64: 14, 32: 64}
# The same where the alternative is to dequantize, which takes 6 ms more than F.linear.
MOST_FOR_OPERATOR_WITHOUT_VNNI = 24
# So many more for each further thread, 8 times at most: threads meet once in the operator, a hundred times otherwise,
# which costs microseconds each time on an idle machine and milliseconds on one that is busy with other work.
MORE_FOR_EACH_THREAD = 4
# Output features of a tile, for each thread. Measured as above: slower below 2000 and above 3000.
TILE_FEATURES = 2816


class CpuInt4Kernel(WeightKernel):
    """Computes a layer with the int4 operator, with 8-bit integers, or by dequantizing.

    Groups larger than 128 are split, which changes no weight.

    Buffers (not saved): packed uint8 and scale_and_zero (G, O, 2) bfloat16 of the operator, weights being
    (code - 8) * scale + zero; nibbles uint8, see nibbles.py; scale_GO float32, divided by FACTOR; of an asymmetric
    layer zero_GO int16, FACTOR times its signed zero points, and offset_GO float32, the product of both; order_I int64,
    the input features sorted by group when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.bits = layer.in_features, layer.spec.scheme.bits
        self.group_size = next(size for size in MOST_FOR_OPERATOR if layer.spec.group_size % size == 0)
        self.widths = tile_widths(layer.out_features, TILE_FEATURES * torch.get_num_threads())
        codes_OI, order_I = ordered_codes(layer)
        repeats = layer.spec.group_size // self.group_size
        scale_GO = layer.scales.float().repeat_interleave(repeats, dim=0)
        zero_GO = None
        if not layer.spec.scheme.sym:
            zero_OG = zero_points(layer).to(torch.int16) - 2 ** (self.bits - 1)
            zero_GO = zero_OG.mul_(FACTOR).t().repeat_interleave(repeats, dim=0).contiguous()
        buffers = {
            "order_I": order_I,
            "packed": _operator_packing(codes_OI, self.bits),
            "scale_and_zero": _operator_scales(scale_GO / FACTOR, zero_GO),
            "nibbles": pack_nibbles(codes_OI, self.bits, self.group_size, self.widths),
            "scale_GO": scale_GO / FACTOR,
            "zero_GO": zero_GO,
            "offset_GO": None if zero_GO is None else zero_GO * (scale_GO / FACTOR),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        return by_rows(layer, x, self.order_I, self._product)

    def codes(self) -> Tensor:
        """Returns (O, I) uint8 codes, input features in the checkpoint's order."""
        codes_OI = torch.cat([tile.codes(self.bits) for tile in self._tiles()])
        return codes_OI if self.order_I is None else codes_OI[:, torch.argsort(self.order_I)]

    def _product(self, x_MI: Tensor) -> Tensor:
        tokens, is_half = x_MI.shape[0], x_MI.dtype in (torch.bfloat16, torch.float16)
        if tokens == 0 or not is_half or (torch.is_grad_enabled() and x_MI.requires_grad):
            return self._dequantized_product(x_MI)
        most = MOST_FOR_OPERATOR[self.group_size] if has_int8_dot_product() else MOST_FOR_OPERATOR_WITHOUT_VNNI
        if tokens <= most + MORE_FOR_EACH_THREAD * min(torch.get_num_threads() - 1, 8):
            # Other dtypes run a scalar loop in the operator (37 ms instead of 1 ms).
            x_bf16 = x_MI.to(torch.bfloat16).contiguous()
            y_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(x_bf16, self.packed, self.group_size, self.scale_and_zero)
            return y_MO.to(x_MI.dtype)
        # A group of 32 costs as much besides its product as one of 128: dequantizing wins in the end.
        if has_int8_dot_product() and (self.group_size == 128 or tokens <= 2 * self.group_size):
            return int8_linear(x_MI, self._tiles(), self.scale_GO, self.offset_GO)
        return self._dequantized_product(x_MI)

    def _dequantized_product(self, x_MI: Tensor) -> Tensor:
        parts = []
        for tile in self._tiles():
            zero_GT = None if self.zero_GO is None else self.zero_GO[:, tile.features]
            parts.append(x_MI @ tile.dequantize(self.scale_GO[:, tile.features], zero_GT, x_MI.dtype))
        return torch.cat(parts, dim=-1)

    def _tiles(self) -> list[NibbleTile]:
        return tiles_of(self.nibbles, self.in_features, self.group_size, self.widths)


def _operator_packing(codes_OI: Tensor, bits: int) -> Tensor:
    codes = (codes_OI + (8 - 2 ** (bits - 1))).to(torch.int32)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)


def _operator_scales(scale_GO: Tensor, zero_GO: Tensor | None) -> Tensor:
    zeros = torch.zeros_like(scale_GO) if zero_GO is None else -(zero_GO * scale_GO)
    return torch.stack([scale_GO * FACTOR, zeros], dim=-1).to(torch.bfloat16).contiguous()


register_backend(
    Backend(
        name="auto_round:torch_cpu_int4",
        aliases=("torch_cpu_int4",),
        prepare=CpuInt4Kernel,
        layouts=frozenset({"gptq", "gptq_zp", "awq"}),
        devices=frozenset({"cpu"}),
        bits=frozenset({2, 3, 4}),
        group_sizes=frozenset({-1, 32, 64, 128, 256}),
        partial_groups=False,
        in_multiple=32,
        out_multiple=16,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        priority=3,
    )
)
