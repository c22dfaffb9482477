"""How far a quantized weight is from the original one: by itself, and weighted by how its inputs are used.

Shape letters: O out features, I in features.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from auto_round.tensors import ROW_FIELDS, QuantizedTensor

VALUES_AT_A_TIME = 1 << 24  # three float32 tensors of them are alive


@dataclasses.dataclass(frozen=True, slots=True)
class LayerError:
    """Squared error of a weight, relative to the squares of the weight.

    Attributes:
        weight: sum of (w - q)**2 over sum of w**2.
        weighted: the same with each input channel weighted by its mean square, the expected squared error of the
            layer's output if channels are not correlated; None if no input was seen.
    """

    weight: float
    weighted: float | None


@torch.no_grad()
def weight_error(
    weight_OI: Tensor, quantized: QuantizedTensor, device: torch.device, channel_means_I: Tensor | None = None
) -> LayerError:
    """Returns the error of a quantized weight, summed in float32, rows at a time.

    Args:
        weight_OI: the original, in any precision.
        channel_means_I: mean square of each input channel, on `device`.
    """
    rows, width = quantized.shape
    step = max(1, VALUES_AT_A_TIME // width)
    lost_I, there_I = torch.zeros(2, width, dtype=torch.float64 if device.type == "cpu" else torch.float32).to(device)
    for start in range(0, rows, step):
        chosen = slice(start, start + step)
        original = weight_OI[chosen].to(device).float()
        dense = _rows(quantized, chosen).to(device).dequantize()
        lost_I += (original - dense).square_().sum(0)
        there_I += original.square().sum(0)
    plain = _ratio(lost_I, there_I)
    if channel_means_I is None:
        return LayerError(plain, None)
    return LayerError(plain, _ratio(lost_I * channel_means_I, there_I * channel_means_I))


def _rows(weight: QuantizedTensor, rows: slice) -> QuantizedTensor:
    fields = {name: getattr(weight, name) for name in ROW_FIELDS}
    return dataclasses.replace(weight, **{name: tensor[rows] for name, tensor in fields.items() if tensor is not None})


def _ratio(lost_I: Tensor, there_I: Tensor) -> float:
    total = float(there_I.sum())
    return float(lost_I.sum()) / total if total > 0 else 0.0
