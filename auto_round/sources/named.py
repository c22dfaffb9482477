"""The weights of a folder whose model is known by the names of its tensors only; no code of a model is run."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from auto_round.checkpoint import quantization_of
from auto_round.errors import ConfigError
from auto_round.models.base import ModelStructure
from auto_round.models.by_names import (
    TEXT_PARTS,
    WEIGHT,
    ModelFacts,
    discover_by_names,
    embedding_key,
    fused_experts_of,
)
from auto_round.models.experts import BIAS, DOWN, ExpertSlice
from auto_round.sources.dequantized import DequantizedTensors
from auto_round.sources.method import read_method
from auto_round.sources.open import dense_dtype
from auto_round.sources.parts import is_range
from auto_round.stored_tensors import NamedTensors, SlicedTensors, StoredTensors
from auto_round.streamed_tensors import StreamedTensors

logger = logging.getLogger(__name__)

LEAVES = ("gate_proj", "up_proj", "down_proj")


class NamedSource:
    """A `checkpoint.WeightSource` whose parameters are called as the checkpoint calls them. Its model is empty.

    Args:
        folder: with config.json.
        stored: its tensors, in 16 bits.
        config: its config.json.
    """

    def __init__(self, folder: Path, stored: NamedTensors, config: Mapping[str, Any]) -> None:
        self.folder: Path | None = folder
        self.model = self.original = nn.Module()
        self.stored, self.config, self.facts = stored, dict(config), ModelFacts.of(config)
        # Ranges of activations are left of an old quantization.
        kept = [key for key in stored if not (isinstance(stored, DequantizedTensors) and is_range(key))]
        shapes = {key: tuple(stored.outline(key).shape) for key in kept}
        self._fused: dict[str, dict[str, ExpertSlice]] = {}
        self._layouts = fused_experts_of(shapes, self.facts.model_type)
        for module, layout in self._layouts.items():
            for name in layout.tensors(with_bias=f"{module}.{DOWN}{BIAS}" in shapes):
                slices = layout.slices(name, LEAVES)
                self._fused[f"{module}.{name}"] = {f"{module}.{piece.parameter}": piece for piece in slices}
        places = {part: (key, piece) for key, parts in self._fused.items() for part, piece in parts.items()}
        self._sliced = SlicedTensors(stored, places)
        self._parts = {key: tuple(self._fused.get(key, (key,))) for key in kept}
        self._extra: tuple[str, ...] = ()

    @property
    def is_parallel(self) -> bool:
        """Whether several threads may read at once."""
        return isinstance(self.stored, StreamedTensors)

    def files(self) -> dict[str, list[str]]:
        """Returns name of a file -> the keys of its tensors, in the order in which they lie in it."""
        found: dict[str, list[str]] = {}
        for key in self._parts:
            place = self.stored.places[key].file if isinstance(self.stored, StreamedTensors) else "weights"
            found.setdefault(place, []).append(key)
        return found

    def pieces(self, stored_key: str, rounded: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields each of the keys that `keys` has for a stored tensor, and its tensor; the file is read once.

        Args:
            rounded: keys whose tensor is not needed any more when the next one is asked for.
        """
        parts = self._parts[stored_key]
        is_lent = isinstance(self.stored, StreamedTensors) and all(key in rounded for key in parts)
        tensor = self.stored.lent(stored_key) if is_lent else self.stored[stored_key]
        for key in parts:
            yield key, self._sliced.places[key][1].of(tensor).contiguous() if key in self._sliced.places else tensor

    def structure(self, block_lists: list[str] | None) -> ModelStructure:
        """Returns blocks and linear layers by the names and shapes of the tensors, see `discover_by_names`."""
        shapes = {key: tuple(self.outline(key).shape) for key in self.keys()}
        found = discover_by_names(shapes, self.facts, block_lists, tuple(self._layouts))
        self._extra = found.extra_modules
        return found

    def longest(self) -> list[Any]:
        """Returns the model's positions and the tokenizer's limit, as the files of the folder have them."""
        assert self.folder is not None
        file = self.folder / "tokenizer_config.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        parts = [part for name in TEXT_PARTS if (part := self.config.get(name))]
        positions = [p[n] for p in (*parts, self.config) for n in ("max_position_embeddings", "n_positions") if n in p]
        return [*positions[:1], tokenizer.get("model_max_length")]

    def keys(self) -> dict[str, str | None]:
        """Returns checkpoint key -> the same; slices of a fused tensor in its place."""
        return {key: key for group in self._parts.values() for key in group}

    def read(self, key: str) -> Tensor:
        """Returns the tensor stored under a checkpoint key, or the slice that a key stands for."""
        return self._sliced.read(key)

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of what `read` would return, on the meta device."""
        return self._sliced.outline(key)

    def ignored(self) -> set[str]:
        """Returns the keys in modules that the code of models leaves out, as layers that predict several tokens."""
        inside = tuple(f"{module}." for module in self._extra)
        return {key for key in self.stored if key.startswith(inside)} if inside else set()

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns key of a stored tensor that holds many experts -> the keys that `keys` has in its place."""
        return {key: tuple(parts) for key, parts in self._fused.items()}

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused tensor of a key of `fused`, made of the tensors in its place."""
        module, _, name = key.rpartition(".")
        own = {self._fused[key][part].parameter: tensor for part, tensor in tensors.items()}
        return self._layouts[module].join(name, own, LEAVES)

    def fused_experts(self) -> tuple[str, ...]:
        """Returns the modules whose experts the checkpoint holds in one tensor for each projection."""
        return tuple(self._layouts)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns what is stored below a module; of a tied output layer the embedding."""
        found = {key: self.read(key) for key in self.keys() if key.startswith(f"{prefix}.")}
        if found:
            return found
        embedding = embedding_key({key: tuple(self.outline(key).shape) for key in self.keys()}, self.facts)
        return {} if embedding is None else {f"{prefix}{WEIGHT}": self.read(embedding)}


def open_named(folder: Path) -> NamedSource:
    """Returns the weights of a folder without asking for its model. What is quantized already is given in 16 bits.

    Raises:
        ConfigError: no config.json.
        UnsupportedError: a folder that is quantized in a way that is not read.
        CheckpointError: no or unreadable weights.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: it is no model folder")
    config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    quantization = quantization_of(config)
    pickled = not (folder / "model.safetensors").is_file() and not list(folder.glob("*.safetensors"))
    if quantization is None:
        return NamedSource(folder, StoredTensors(folder) if pickled else StreamedTensors(folder), config)
    method, dtype = read_method(quantization), dense_dtype(config)
    # Mapped files: the parts of packed weights are looked at for their shapes, too.
    tensors = DequantizedTensors(StoredTensors(folder), method, dtype)
    logger.info(
        "%s is quantized (%s): %d weights are dequantized to %s as they are read",
        folder, method.name, len(tensors.packed), str(dtype).removeprefix("torch."),
    )  # fmt: skip
    return NamedSource(folder, tensors, config)
