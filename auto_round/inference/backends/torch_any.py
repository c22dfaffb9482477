"""Backend "torch": unpacks and dequantizes in plain PyTorch, then multiplies. Runs everything, on any device.

It is the meaning of a quantized layer: exactly `F.linear(x, QuantizedTensor.dequantize(x.dtype), bias)`, with the input
passed through `quantize_activation` first where the scheme says so. The other backends are tested against it.

Shape letters: O out features, I in features, G groups, K group size, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from auto_round.data_types import DATA_TYPES
from auto_round.inference.backends.base import Backend, register_backend
from auto_round.inference.bit_unpack import unpack_awq_columns, unpack_rows
from auto_round.inference.dequantize import ROW_LAYOUTS, RowKernel, linear_in_chunks
from auto_round.inference.input_quantization import QuantizedInput
from auto_round.inference.layer import QuantizedLinear
from auto_round.layouts import LAYOUTS

# Weights dequantized and multiplied at once on a CPU, so that they stay in the second-level cache. Measured on 11008 x
# 4096 of 4 bits, one token in bfloat16 on one core: 47 ms, against 94 ms where the product waits for the whole weight.
CPU_CHUNK = 512 * 1024


# Names that the reference has for kernels of one kind of weight each.
REFERENCE_NAMES = ("torch_zp", "torch_fp8_static", "torch_mxfp8", "torch_mxfp4", "torch_mxint4", "torch_nvfp4", "fake")


def make_kernel(layer: QuantizedLinear) -> nn.Module:
    """Returns the kernel of a layer of any layout."""
    kernel = RowKernel() if layer.spec.layout in ROW_LAYOUTS else DequantizeKernel(layer)
    return QuantizedInput(kernel) if layer.spec.scheme.quantizes_activations else kernel


class DequantizeKernel(nn.Module):
    """Computes a layer of GPTQ's or AWQ's layout by dequantizing its weight on every call.

    Buffers (not saved): zero_OG uint8, the zero points of an asymmetric layer; group_I int64, the group of each input
    feature when groups are out of order or the last one is shorter.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        zero_OG = None if layer.spec.scheme.sym else zero_points(layer)
        self.register_buffer("zero_OG", zero_OG, persistent=False)
        group_I = None
        if not layer.has_ordered_groups():
            group_I = layer.g_idx.long()
        elif layer.in_features % layer.spec.group_size:
            group_I = layer.sequential_groups()
        self.register_buffer("group_I", group_I, persistent=False)

    def forward(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        return linear_in_chunks(layer, x, _chunks(layer), lambda rows: self.weight(layer, rows, x.dtype))

    def weight(self, layer: QuantizedLinear, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns (R, I) weights scale * (code - zero point) of some output features, which start at a multiple of 8.

        They are computed in float32, and rounded once to `dtype`.
        """
        zero_RG = 2 ** (layer.spec.scheme.bits - 1) if self.zero_OG is None else self.zero_OG[rows].float()
        return self._scale(unpack_codes(layer, rows).float(), layer.scales.t()[rows].float(), zero_RG).to(dtype)

    def _scale(self, codes_RI: Tensor, scale_RG: Tensor, zero_RG: Tensor | int) -> Tensor:
        """Returns (R, I) float32; changes `codes_RI` in place."""
        if self.group_I is not None:
            zero_RI = zero_RG if isinstance(zero_RG, int) else zero_RG[:, self.group_I]
            return codes_RI.sub_(zero_RI).mul_(scale_RG[:, self.group_I])
        grouped = codes_RI.unflatten(1, (scale_RG.shape[1], -1))
        zero = zero_RG if isinstance(zero_RG, int) else zero_RG[..., None]
        return grouped.sub_(zero).mul_(scale_RG[..., None]).flatten(1)


def _chunks(layer: QuantizedLinear) -> Iterator[slice]:
    """Yields the output features to be dequantized together."""
    step = layer.out_features
    if layer.device.type == "cpu":
        # A multiple of 8: AWQ packs eight rows into one word.
        step = max(CPU_CHUNK // layer.in_features // 8, 1) * 8
    return (slice(start, min(start + step, layer.out_features)) for start in range(0, layer.out_features, step))


def unpack_codes(layer: QuantizedLinear, rows: slice) -> Tensor:
    """Returns (R, I) uint8 codes of some rows; for the AWQ layout `rows` starts at a multiple of 8."""
    words = layer.qweight.t()
    if layer.spec.layout == "awq":
        return unpack_awq_columns(words[rows.start // 8 : -(-rows.stop // 8)])[: rows.stop - rows.start]
    return unpack_rows(words[rows], layer.spec.scheme.bits)[:, : layer.in_features]


def ordered_codes(layer: QuantizedLinear) -> tuple[Tensor, Tensor | None]:
    """Returns (O, I) uint8 codes, input features sorted by group, and that order (I,); None when it is their own."""
    codes_OI, order_I = unpack_codes(layer, slice(0, layer.out_features)), layer.group_order()
    return (codes_OI if order_I is None else codes_OI[:, order_I]), order_I


def by_rows(layer: QuantizedLinear, x: Tensor, order_I: Tensor | None, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns (..., O): `product` of x's rows (M, I), features in the kernel's order, plus the bias."""
    x_MI = x.reshape(-1, layer.in_features)
    y_MO = product(x_MI if order_I is None else x_MI[:, order_I])
    if layer.bias is not None:
        y_MO = y_MO + layer.bias.to(y_MO.dtype)
    return y_MO.reshape(*x.shape[:-1], layer.out_features)


def zero_points(layer: QuantizedLinear) -> Tensor:
    """Returns (O, G) uint8 zero points as stored, brought to the grid of codes."""
    rows = layer.out_features
    if layer.spec.layout == "awq":
        return unpack_awq_columns(layer.qzeros.t())[:rows].contiguous()
    stored_GO = unpack_rows(layer.qzeros, layer.spec.scheme.bits)[:, :rows]
    # A stored zero point of -1 wraps to 2**bits - 1 and reads as 2**bits; 256 does not fit, as in layouts/gptq.py.
    zero_GO = (stored_GO.to(torch.int16) + LAYOUTS[layer.spec.layout].zero_offset).clamp(max=255)
    return zero_GO.to(torch.uint8).t().contiguous()


register_backend(
    Backend(
        name="auto_round:torch",
        aliases=("torch", *REFERENCE_NAMES, *(f"auto_round:{name}" for name in REFERENCE_NAMES)),
        prepare=make_kernel,
        layouts=ROW_LAYOUTS | {"gptq", "gptq_zp", "awq"},
        data_types=frozenset(DATA_TYPES),
        activations=None,
        devices=frozenset({"cpu", "cuda", "xpu"}),
        bits=frozenset(range(2, 9)),
        sym=frozenset({True, False}),
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        priority=0,
    )
)
