"""The tensors of a model folder by the names that they are stored under, as they lie on disk."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.models.experts import ExpertSlice
from auto_round.shards import INDEX_NAME

PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"


class NamedTensors(Mapping[str, Tensor]):
    """Tensors by checkpoint key, each made when it is asked for."""

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of a tensor: the same on the meta device."""
        return self[key].to("meta")


class SlicedTensors:
    """Tensors by checkpoint key, where some keys stand for slices of fused tensors.

    Args:
        stored: what there is.
        places: key of a slice -> the key of the tensor that holds it, and which part of it.
    """

    def __init__(self, stored: NamedTensors, places: Mapping[str, tuple[str, ExpertSlice]]) -> None:
        self.stored, self.places = stored, places

    def read(self, key: str) -> Tensor:
        """Returns the tensor stored under a checkpoint key, or the slice that a key stands for."""
        if key not in self.places:
            return self.stored[key]
        fused, piece = self.places[key]
        return piece.of(self.stored[fused]).contiguous()

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of what `read` would return, on the meta device."""
        if key not in self.places:
            return self.stored.outline(key)
        fused, piece = self.places[key]
        return piece.of(self.stored.outline(fused)).contiguous()


class StoredTensors(NamedTensors):
    """The tensors of a folder by checkpoint key, each read when it is asked for. Files are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_map(folder)
        self._open: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        file = self.files[key]
        if file not in self._open:
            self._open[file] = _open_file(self.folder / file)
        handle = self._open[file]
        try:
            return handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {file} does not hold {key} ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def weight_map(folder: Path) -> dict[str, str]:
    """Returns checkpoint key -> file name, safetensors before pickled weights."""
    for index_name, pattern in ((INDEX_NAME, "*.safetensors"), (PICKLED_INDEX_NAME, "pytorch_model*.bin")):
        index = folder / index_name
        if index.is_file():
            try:
                files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"{index} is no index of weights: {error!r}") from error
            absent = sorted({file for file in files.values() if not (folder / file).is_file()})
            if absent:
                raise CheckpointError(f"{folder}: the index names files that are not there: {', '.join(absent)}")
            return files
        found = sorted(folder.glob(pattern))
        if found:
            return {key: file.name for file in found for key in _open_file(file).keys()}
    raise CheckpointError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")


def _open_file(file: Path) -> Any:
    """Returns a safetensors handle, or the dictionary of a pickled file, memory-mapped and loaded with weights_only.

    Raises:
        CheckpointError: the file is damaged, or a pickle with more in it than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
