"""How strongly the input channels of layers are used while a model runs, measured by hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ROWS_AT_A_TIME = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ChannelSums:
    """What was seen of one layer's inputs.

    Attributes:
        squares: (I,) float32 sums of squares over tokens.
        tokens: how many there were.
    """

    squares: Tensor
    tokens: int


def sums_of(rows_RI: Tensor) -> ChannelSums:
    """Returns the sums over rows, a part of them at a time in float32."""
    squares = torch.zeros(rows_RI.shape[1], device=rows_RI.device)
    for piece in rows_RI.split(ROWS_AT_A_TIME):
        squares += piece.float().square().sum(0)
    return ChannelSums(squares, len(rows_RI))


class ChannelMeans:
    """Measures the mean square of each input channel of some linear layers; hooks are there inside `with` only.

    Args:
        model: any module.
        weights: names of weight parameters.
    """

    def __init__(self, model: nn.Module, weights: Sequence[str]) -> None:
        self._model, self._weights = model, weights
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def values(self) -> dict[str, Tensor]:
        """Returns weight name -> (I,) float32; a layer that never ran is missing."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def __enter__(self) -> ChannelMeans:
        for weight in self._weights:
            module = self._model.get_submodule(weight.removesuffix(".weight"))

            def keep(_module: nn.Module, args: tuple[Tensor, ...], name: str = weight) -> None:
                rows_RI = args[0].detach().flatten(0, -2).float()
                total = rows_RI.square().sum(0)
                self._sums[name] = self._sums[name] + total if name in self._sums else total
                self._counts[name] = self._counts.get(name, 0) + len(rows_RI)

            self._handles.append(module.register_forward_pre_hook(keep))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
