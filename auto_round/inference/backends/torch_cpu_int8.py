"""Backend "torch_cpu_int8": 8 bits on a CPU with PyTorch alone.

A few tokens go through PyTorch's int8 operator in bfloat16, group by group. For more, where it is slow, activations are
rounded to 8 bits too (see int8_product.py) if the processor has VNNI. What neither serves (gradients, no VNNI) is
dequantized exactly, some rows at a time. `backend="torch"` is exact always.

Memory: 8 bits a weight besides scales; the checkpoint's own packing is given up and made again when it is asked for.

Shape letters: O out features, I in features, G groups, K group size, M tokens, R rows of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.backends.torch_any import by_rows, ordered_codes, zero_points
from auto_round.inference.int8_product import int8_linear, tile_features, tile_widths
from auto_round.inference.layer import QuantizedLinear, WeightKernel
from auto_round.inference.processor import has_int8_dot_product

GROUP_SIZES = (128, 64, 32)
# Tokens that the operator takes. Measured on one AVX-512 core (Zen 4), 4096 x 4096 in groups of 128: it needs 1.9 ms
# for one token, 3.2 for 4 and 5.9 for 8; integer products 4.5 for 8 and 6.3 for 16, most of it to put the weight in
# order; bfloat16 F.linear 3.4, 3.2, 3.8 and 5.0.
MOST_FOR_OPERATOR = 4
TILE_FEATURES = 2816
# Rows multiplied at once, and weights dequantized at once, whose float32 values stay in the second-level cache.
ROWS = 512
CHUNK = 256 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class RowTile:
    """Some output features of a weight whose rows lie one after the other: signed_GTK int8, codes less 128."""

    features: slice
    signed_GTK: Tensor

    def matrices(self, count: int) -> Iterator[Sequence[Tensor]]:
        """Yields (K, T) int8 matrices of `count` groups after another, their signed codes."""
        matrices = self.signed_GTK.transpose(1, 2).unbind()
        for start in range(0, len(matrices), count):
            yield matrices[start : start + count]


class CpuInt8Kernel(WeightKernel):
    """Computes a layer with the int8 operator, with 8-bit integers, or by dequantizing.

    Groups larger than 128 are split, which changes no weight.

    Buffers (not saved): signed_GOK int8, codes less 128; scale_GO float32; of an asymmetric layer zero_GO int8, zero
    points less 128, and offset_GO float32, their product with scales; order_I int64, the input features sorted by group
    when groups are out of order.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        group_size = next(size for size in GROUP_SIZES if layer.spec.group_size % size == 0)
        repeats = layer.spec.group_size // group_size
        codes_OI, order_I = ordered_codes(layer)
        signed_OGK = (codes_OI - 128).view(torch.int8).unflatten(1, (-1, group_size))
        scale_GO = layer.scales.float().repeat_interleave(repeats, dim=0)
        zero_GO = None
        if not layer.spec.scheme.sym:
            zero_GO = (zero_points(layer).t() - 128).repeat_interleave(repeats, dim=0).view(torch.int8)
        buffers = {
            "order_I": order_I,
            "signed_GOK": signed_OGK.transpose(0, 1).contiguous(),
            "scale_GO": scale_GO,
            "zero_GO": zero_GO,
            "offset_GO": None if zero_GO is None else zero_GO * scale_GO,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        return by_rows(layer, x, self.order_I, self._product)

    def codes(self) -> Tensor:
        """Returns (O, I) uint8 codes, input features in the checkpoint's order."""
        codes_OI = self.signed_GOK.transpose(0, 1).flatten(1).view(torch.uint8) + 128
        return codes_OI if self.order_I is None else codes_OI[:, torch.argsort(self.order_I)]

    def _product(self, x_MI: Tensor) -> Tensor:
        is_half = x_MI.dtype in (torch.bfloat16, torch.float16)
        if x_MI.shape[0] == 0 or not is_half or (torch.is_grad_enabled() and x_MI.requires_grad):
            return self._dequantized_product(x_MI)
        group_size = self.signed_GOK.shape[2]
        if x_MI.shape[0] <= MOST_FOR_OPERATOR:
            return self._operator_product(x_MI).to(x_MI.dtype)
        # A group of 32 costs as much besides its product as one of 128: dequantizing wins in the end.
        if has_int8_dot_product() and (group_size == 128 or x_MI.shape[0] <= 2 * group_size):
            return int8_linear(x_MI, self._tiles(), self.scale_GO, self.offset_GO)
        return self._dequantized_product(x_MI)

    def _tiles(self) -> list[RowTile]:
        widths = tile_widths(self.scale_GO.shape[1], TILE_FEATURES * torch.get_num_threads())
        return [RowTile(features, self.signed_GOK[:, features]) for features in tile_features(widths)]

    def _operator_product(self, x_MI: Tensor) -> Tensor:
        """Returns (M, O): bfloat16 for one group, float32 sums over several."""
        # Other dtypes run a scalar loop (17 ms instead of 1.4 ms).
        x_GMK = x_MI.to(torch.bfloat16).unflatten(1, (self.signed_GOK.shape[0], -1)).transpose(0, 1).contiguous()
        scale_GO = self.scale_GO.to(torch.bfloat16)
        products = map(torch.ops.aten._weight_int8pack_mm, x_GMK, self.signed_GOK, scale_GO)
        y_MO = next(products)
        if len(x_GMK) > 1:
            y_MO = y_MO.float()
        for product_MO in products:
            y_MO += product_MO
        if self.offset_GO is not None:
            sum_MG = x_GMK.float().sum(dim=-1).t()
            y_MO = y_MO - sum_MG @ self.offset_GO
        return y_MO

    def _dequantized_product(self, x_MI: Tensor) -> Tensor:
        rows = self.scale_GO.shape[1]
        parts = [F.linear(x_MI, self._weight(slice(i, min(i + ROWS, rows)), x_MI.dtype)) for i in range(0, rows, ROWS)]
        return torch.cat(parts, dim=-1)

    def _weight(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns (rows, I) weights scale * (code - zero point), computed in float32, rounded once to `dtype`."""
        groups, _, size = self.signed_GOK.shape
        weight_RGK = torch.empty((rows.stop - rows.start, groups, size), dtype=dtype)
        step = max(CHUNK // (groups * size), 1)
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            signed_RGK = self.signed_GOK[:, some].transpose(0, 1).float()
            if self.zero_GO is not None:
                signed_RGK -= self.zero_GO[:, some].t()[..., None]
            signed_RGK *= self.scale_GO[:, some].t()[..., None]
            weight_RGK[some.start - rows.start : some.stop - rows.start] = signed_RGK
        return weight_RGK.flatten(1)


register_backend(
    Backend(
        name="auto_round:torch_cpu_int8",
        aliases=("torch_cpu_int8",),
        prepare=CpuInt8Kernel,
        layouts=frozenset({"gptq", "gptq_zp"}),
        devices=frozenset({"cpu"}),
        bits=frozenset({8}),
        group_sizes=frozenset({-1, 32, 64, 128, 256}),
        partial_groups=False,
        # The operator reads beyond rows that do not fill its vectors.
        in_multiple=32,
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        priority=3,
    )
)
