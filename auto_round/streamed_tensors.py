"""Safetensors files read tensor by tensor with plain reads, by several threads at once.

Unlike mapped files, what was read does not stay in the process: its memory is that of the tensors in use.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from auto_round.errors import CheckpointError
from auto_round.shards import DTYPE_NAMES
from auto_round.stored_tensors import NamedTensors, weight_map

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LONGEST_HEADER = 100_000_000  # as the safetensors library has it


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies."""

    file: str
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class StreamedTensors(NamedTensors):
    """The tensors of a folder of safetensors files by checkpoint key, in the order in which they lie on disk.

    Raises:
        CheckpointError: no weights, weights in other files than safetensors, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_map(folder)
        others = sorted({file for file in files.values() if not file.endswith(".safetensors")})
        if others:
            raise CheckpointError(f"{folder}: {others[0]} is no safetensors file")
        places = {key: p for file in sorted(set(files.values())) for key, p in _places(folder, file) if key in files}
        missing = sorted(files.keys() - places.keys())
        if missing:
            raise CheckpointError(f"{folder}: {files[missing[0]]} does not hold {missing[0]}")
        self._own = threading.local()
        self.places = dict(sorted(places.items(), key=lambda item: (item[1].file, item[1].start)))

    def __getitem__(self, key: str) -> Tensor:
        """Returns a tensor in memory of its own."""
        return self._read(key, torch.empty(self.places[key].size, dtype=torch.uint8))

    def lent(self, key: str) -> Tensor:
        """Returns a tensor that is good until the same thread asks for another one: memory is used again.

        Fresh memory comes from the system page by page, which takes a third of the time of rounding what is in it.
        """
        size = self.places[key].size
        if getattr(self._own, "data", None) is None or self._own.data.numel() < size:
            self._own.data = torch.empty(size, dtype=torch.uint8)
        return self._read(key, self._own.data[:size])

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of a tensor, on the meta device; nothing is read."""
        place = self.places[key]
        return torch.empty(place.shape, dtype=place.dtype, device="meta")

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _read(self, key: str, data: Tensor) -> Tensor:
        """Returns a tensor, read into as many bytes as it takes."""
        place = self.places[key]
        buffer, done = memoryview(data.numpy()), 0
        with open(self.folder / place.file, "rb", buffering=0) as opened:
            opened.seek(place.start)
            while done < place.size:
                count = opened.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{self.folder}: {place.file} ends within {key}")
                done += count
        return data.view(place.dtype).view(place.shape)


def _places(folder: Path, file: str) -> Iterator[tuple[str, Place]]:
    """Yields key and place of each tensor of a file, from its header."""
    with open(folder / file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > LONGEST_HEADER:
            raise CheckpointError(f"{folder / file} cannot be read: a header of {length} bytes")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                yield key, Place(file, 8 + length + start, end - start, DTYPES[entry["dtype"]], shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / file} cannot be read: {error!r} in its header") from error
