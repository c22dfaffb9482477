"""Products of rows with the matrices of their groups: one call for the experts of a layer, whatever their number.

Shape letters: R rows, E groups, I in features, O out features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNED_BYTES = 16  # to which PyTorch's grouped product wants every row to start
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(rows_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Returns (R, O): each row times the transposed matrix of its group.

    Where PyTorch has a grouped product, no group needs a call of its own and the host waits for nothing.

    Args:
        rows_RI: the rows of each group together.
        ends_E: int32, where the rows of each group end; the last one is R. A group may have none.
    """
    if _has_grouped_product(rows_RI, weights_EOI):
        return _GroupedLinear.apply(rows_RI, weights_EOI, ends_E)
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    # unbind: the gradient of all matrices is put together once, where that of a slice is as large as all of them.
    pieces = zip(rows_RI.split(counts), weights_EOI.unbind(0), strict=True)
    return torch.cat([torch.nn.functional.linear(rows, weight_OI) for rows, weight_OI in pieces])


def permuted(rows: Tensor, order: Tensor) -> Tensor:
    """Returns `rows[order]` for a permutation; the gradient is gathered too, so that its sums need no sorting."""
    return _Permuted.apply(rows, order)


def _has_grouped_product(rows_RI: Tensor, weights_EOI: Tensor) -> bool:
    """Whether PyTorch (2.10 and later) has a grouped product for these tensors."""
    step = ALIGNED_BYTES // rows_RI.element_size()
    is_aligned = weights_EOI.shape[1] % step == 0 and weights_EOI.shape[2] % step == 0
    if not hasattr(torch.nn.functional, "grouped_mm") or not is_aligned or rows_RI.dtype != weights_EOI.dtype:
        return False
    if not len(rows_RI) or rows_RI.dtype not in GROUPED_DTYPES:
        return False
    if rows_RI.device.type == "cpu":
        return True
    is_nvidia = rows_RI.is_cuda and torch.version.hip is None
    return is_nvidia and rows_RI.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows_RI.device) >= (8, 0)


class _GroupedLinear(torch.autograd.Function):
    """PyTorch's own gradient refuses gradients that are not contiguous, as those of interleaved gates are."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
        rows_RI, weights_EOI = rows_RI.contiguous(), weights_EOI.contiguous()
        ctx.save_for_backward(rows_RI, weights_EOI, ends_E)
        return torch.nn.functional.grouped_mm(rows_RI, weights_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        rows_RI, weights_EOI, ends_E = ctx.saved_tensors
        gradient_RO, product = gradient_RO.contiguous(), torch.nn.functional.grouped_mm
        needs_rows, needs_weights, _ = ctx.needs_input_grad
        by_rows = product(gradient_RO, weights_EOI, offs=ends_E) if needs_rows else None
        by_weights = product(gradient_RO.t(), rows_RI, offs=ends_E) if needs_weights else None
        return by_rows, by_weights, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return gradient[torch.argsort(order)], None
