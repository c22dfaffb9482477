"""The weights of a model as a run quantized them, under the names that they have in 16 bits.

With it the quantized model streams block by block like any other, its embedding and output layer included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.formats.export import HEAD_BLOCK
from auto_round.plan import Plan
from auto_round.store import RunStore
from auto_round.tensors import BlockResult


class QuantizedSource:
    """Dequantized weights and tuned norms of a finished run; everything else as the original source gives it.

    Args:
        source: the original weights.
        device, dtype: where and in what precision weights are dequantized.
    """

    def __init__(
        self, source: WeightSource, plan: Plan, store: RunStore, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.source, self.store, self.device, self.dtype = source, store, device, dtype
        self.model, self.original, self.folder = source.model, source.original, source.folder
        self._names = source.keys()
        self._transposed = frozenset(entry.layer.parameter for entry in plan.entries if entry.layer.transposed)
        self._outside = frozenset(plan.outside())
        self._group_of = {name: group[0] for group in plan.groups for name in group}
        self._last: tuple[str, BlockResult] | None = None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns parameters and buffers below a module, by full name within the model."""
        group = self._group_of.get(prefix, "")
        return {name: self._quantized(name, tensor, group) for name, tensor in self.source.tensors(prefix).items()}

    def read(self, key: str) -> Tensor:
        """Returns the tensor that stands for what is stored under a checkpoint key outside the blocks."""
        return self._quantized(self._names[key] or "", self.source.read(key), "")

    def keys(self) -> dict[str, str | None]:
        """Returns the source's own."""
        return dict(self._names)

    def outline(self, key: str) -> Tensor:
        """Returns the source's own."""
        return self.source.outline(key)

    def ignored(self) -> set[str]:
        """Returns the source's own."""
        return self.source.ignored()

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns the source's own."""
        return self.source.fused()

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the source's own."""
        return self.source.join(key, tensors)

    def fused_experts(self) -> tuple[str, ...]:
        """Returns the source's own."""
        return self.source.fused_experts()

    def result(self, group: str) -> BlockResult:
        """Returns what was stored for a group of blocks, by its first name; the last one is remembered."""
        if self._last is None or self._last[0] != group:
            self._last = None  # two results need not be in memory together
            self._last = group, self.store.load(group)
        return self._last[1]

    def outside(self) -> BlockResult:
        """Returns what was stored for weights outside the blocks; nothing if none are quantized."""
        return self.result(HEAD_BLOCK) if self._outside else BlockResult({})

    def dense(self, name: str, result: BlockResult) -> Tensor:
        """Returns a quantized weight as the model holds it."""
        dense_OI = result.weights[name].to(self.device).dequantize(self.dtype)
        return dense_OI.t() if name in self._transposed else dense_OI

    def _quantized(self, name: str, tensor: Tensor, group: str) -> Tensor:
        if group or name in self._outside:
            result = self.result(group) if group else self.outside()
            if name in result.weights:
                return self.dense(name, result)
            return result.plain.get(name, tensor)
        return tensor
