"""A checkpoint as it lies on disk: what index and headers say, its tensors one at a time, its packed weights read back.

Files are mapped, not loaded. Whatever does not fit together is collected in `problems`, so that one look finds it all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_round.layouts import Layout
from auto_round.plan import PlanEntry
from auto_round.shards import DTYPE_NAMES, INDEX_NAME
from auto_round.tensors import QuantizedTensor, dequantize_by_rows

TORCH_NAMES = {stored: str(dtype).removeprefix("torch.") for dtype, stored in DTYPE_NAMES.items()}
SINGLE_FILE = "model.safetensors"
SHOWN = 5


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype ("float16", "int32") of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Returns the spec of a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class WrittenWeight:
    """One quantized weight in the form that a checkpoint holds it in.

    Attributes:
        entry: what the plan says of it.
        key: name of the original weight in checkpoints, e.g. "model.layers.0.mlp.up_proj.weight".
        layout: how it is packed, or None when its dequantized values are stored.
        specs: checkpoint key -> spec of each tensor that stands for it.
        dtype: of the original weight.
    """

    entry: PlanEntry
    key: str
    layout: Layout | None
    specs: Mapping[str, TensorSpec]
    dtype: torch.dtype

    @property
    def layer(self) -> str:
        """Name of its layer in checkpoints."""
        return self.key.removesuffix(".weight")

    def packed(self, written: WrittenCheckpoint, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Returns its stored tensors by local name (`qweight` ...)."""
        start = len(self.layer) + 1
        return {key[start:]: written.read(key).to(device) for key in self.specs}

    def unpacked(self, written: WrittenCheckpoint, device: torch.device | str = "cpu") -> QuantizedTensor:
        """Returns what its packed tensors stand for, read with the scheme of the plan as a loader does."""
        assert self.layout is not None
        return self.layout.unpack(self.packed(written, device), self.entry.scheme, self.entry.layer.shape)

    def as_stored(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """Returns dequantized values in the orientation of the original weight."""
        dense = dequantize_by_rows(weight, dtype)
        return dense.t().contiguous() if self.entry.layer.transposed else dense


class WrittenCheckpoint:
    """The safetensors files of a folder, reopened.

    Attributes:
        specs: checkpoint key -> spec, from the files' headers.
        problems: what is wrong with files, index and headers; empty when all is well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self.problems: list[str] = []
        self._handles: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        files = sorted(folder.glob("*.safetensors"))
        size = sum(self._open(file) for file in files)
        self._check_index({file.name for file in files}, size)
        for name in ("config.json", "quantization_config.json"):
            self._check_json(folder / name)

    def read(self, key: str) -> Tensor:
        """Returns one tensor."""
        return self._handles[self._files[key]].get_tensor(key)

    def _open(self, file: Path) -> int:
        """Reads the header of a file; returns the bytes of its tensors."""
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            self.problems.append(f"{file.name} cannot be read: {error}")
            return 0
        self._handles[file.name] = handle
        for key in handle.keys():
            if key in self._files:
                self.problems.append(f"{key} is both in {self._files[key]} and in {file.name}")
            stored = handle.get_slice(key)
            code = stored.get_dtype()
            self.specs[key] = TensorSpec(tuple(stored.get_shape()), TORCH_NAMES.get(code, code))
            self._files[key] = file.name
        with open(file, "rb") as opened:  # safetensors checked that data fill the rest of the file
            return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")

    def _check_index(self, files: set[str], size: int) -> None:
        index = self.folder / INDEX_NAME
        if not index.is_file():
            if files != {SINGLE_FILE}:
                self.problems.append(
                    f"without {INDEX_NAME} all weights must be in {SINGLE_FILE}, not in {sorted(files)}"
                )
            return
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            weight_map, total = dict(content["weight_map"]), content["metadata"]["total_size"]
        except (ValueError, KeyError, TypeError) as error:
            self.problems.append(f"{INDEX_NAME} is no index of weights: {error!r}")
            return
        named = set(weight_map.values())
        self._note("files that the index names are not there", named - files)
        self._note("files that the index does not name", files - named)
        self._note("tensors that the index lacks", self._files.keys() - weight_map.keys())
        there = {key for key, file in weight_map.items() if self._files.get(key) == file or file not in files}
        self._note("tensors that are not in the file that the index names", weight_map.keys() - there)
        if total != size:
            self.problems.append(f"{INDEX_NAME}: total_size {total}, but the tensors have {size} bytes")

    def _check_json(self, file: Path) -> None:
        if not file.is_file() and file.name != "config.json":
            return
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.problems.append(f"{file.name} cannot be read: {error}")

    def _note(self, what: str, names: Iterable[str]) -> None:
        self.problems += listed(what, names)


def listed(what: str, names: Iterable[str]) -> list[str]:
    """Returns one line for some names, or none if there are none."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return [f"{what}: {', '.join(ordered[:SHOWN])}{more}"] if ordered else []
