"""The tensors of a quantized model by the names that they had before: weights are dequantized when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from auto_round.sources.method import SourceMethod
from auto_round.sources.parts import PackedWeight, is_range, packed_weights
from auto_round.sources.unpack import dense_shape, unpack
from auto_round.stored_tensors import NamedTensors
from auto_round.tensors import dequantize_by_rows


class DequantizedTensors(NamedTensors):
    """Tensors of a checkpoint by key; a quantized weight has the key that it would have in 16 bits.

    Args:
        stored: the tensors as they lie on disk.
        method: how weights are stored.
        dtype: of weights, once they are dequantized.
        transposed: names of layers whose weights the model holds as (in, out).
    """

    def __init__(
        self, stored: NamedTensors, method: SourceMethod, dtype: torch.dtype, transposed: Sequence[str] = ()
    ) -> None:
        self.stored, self.method, self.dtype, self.transposed = stored, method, dtype, tuple(transposed)
        names = dict.fromkeys(stored)
        self.packed = packed_weights(names)
        owner = {part: weight.key for weight in self.packed.values() for part in weight.parts.values()}
        self._keys = dict.fromkeys(owner.get(key, key) for key in names)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.packed:
            return self._plain(key, self.stored[key])
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None
        dense = self._dense(key, self._parts(key))
        if dense.ndim == 3:  # its experts are asked for one after the other
            self._last = key, dense
        return dense

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of a tensor, on the meta device."""
        if key not in self.packed:
            return self._plain(key, self.stored.outline(key))
        # Files are mapped: a part whose values are not looked at is not read.
        shape = dense_shape(self._parts(key), self.method, key)
        if self._turned(key, shape):
            shape = (*shape[:-2], shape[-1], shape[-2])
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def is_leftover(self, key: str) -> bool:
        """Whether a tensor that no part of the model takes is left of the old quantization.

        That is a range of activations, or the bias of zeros that AutoGPTQ puts beside each weight.
        """
        return is_range(key) or (self._layer_of_bias(key) is not None and not bool(self.stored[key].any()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def _plain(self, key: str, tensor: Tensor) -> Tensor:
        """Returns a tensor that is not packed; biases that a format keeps in float16 have the model's dtype again."""
        return tensor.to(self.dtype) if self._layer_of_bias(key) else tensor

    def _layer_of_bias(self, key: str) -> PackedWeight | None:
        """Returns the quantized weight that a tensor is the bias of."""
        return self.packed.get(f"{key.removesuffix('.bias')}.weight") if key.endswith(".bias") else None

    def _parts(self, key: str) -> Mapping[str, Tensor]:
        return {name: self.stored[part] for name, part in self.packed[key].parts.items()}

    def _turned(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight is stored (out, in) and held by the model as (in, out)."""
        if "weight_blocks" in self.packed[key].parts:
            return len(shape) == 3  # gpt-oss: (experts, out, in) on disk, (experts, in, out) in 16 bits
        layer = key.removesuffix(".weight")
        return any(f".{name}".endswith(f".{layer}") or f".{layer}".endswith(f".{name}") for name in self.transposed)

    def _dense(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns a weight in 16 bits as the model holds it."""
        shape = dense_shape(parts, self.method, key)
        if len(shape) == 2:
            dense = dequantize_by_rows(unpack(parts, self.method, key), self.dtype)
            return dense.t().contiguous() if self._turned(key, shape) else dense
        outer, rows, width = shape
        turned = self._turned(key, shape)
        dense = torch.empty((outer, width, rows) if turned else shape, dtype=self.dtype)
        for index in range(outer):
            own = {name: tensor[index] if tensor.shape[:1] == (outer,) else tensor for name, tensor in parts.items()}
            dense[index] = self._expert(key, own).t() if turned else self._expert(key, own)
        return dense

    def _expert(self, key: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns a matrix of a fused tensor, in the orientation in which it is stored."""
        scale = parts.get("weight_scale")
        if scale is None or scale.shape != (1, parts["weight"].shape[1]):
            return dequantize_by_rows(unpack(parts, self.method, key), self.dtype)
        # fbgemm's experts are stored (in, out), with scales for the outputs.
        turned = {"weight": parts["weight"].t(), "weight_scale": scale.t()}
        return dequantize_by_rows(unpack(turned, self.method, key), self.dtype).t()
