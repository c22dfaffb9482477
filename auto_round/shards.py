"""Writes safetensors shards of bounded size while tensors come, without holding a shard in memory.

Small shards are collected and written whole. A large one is written as it comes: room for the header is left at the
start of the file, tensor data follows, and the header, filled up with spaces as the format allows, is put in last.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from auto_round.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
STREAMED_FROM = 64 << 20
HEADER_ROOM = 256 << 10
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint32: "U32", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class ShardWriter:
    """Writes tensors into shards of bounded size as they come, then the index.

    Args:
        folder: made if it is not there.
        max_shard_bytes: a shard is closed before it would grow past this.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._open: _Shard | None = None

    def add(self, key: str, tensor: Tensor) -> None:
        """Takes one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._open is not None and self._open.size + size > self.max_shard_bytes:
            self._open.close()
            self._open = None
        if self._open is None:
            self._open = _Shard(self.folder / f".part-{len(self._shards) + 1:05d}.safetensors")
            self._shards.append(self._open)
        self._open.add(key, tensor.detach().cpu().contiguous())

    def close(self) -> None:
        """Finishes the last shard, names all of them and writes the index when there are several."""
        if self._open is not None:
            self._open.close()
        count = len(self._shards)
        weight_map = {}
        for number, shard in enumerate(self._shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            shard.file.rename(self.folder / name)
            weight_map.update(dict.fromkeys(shard.keys, name))
        if count > 1:
            total = sum(shard.size for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Shard:
    """One file, collected in memory until it is worth streaming."""

    def __init__(self, file: Path) -> None:
        self.file, self.size = file, 0
        self.keys: list[str] = []
        self._pending: dict[str, Tensor] = {}
        self._stream: IO[bytes] | None = None
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offset = 0

    def add(self, key: str, tensor: Tensor) -> None:
        self.keys.append(key)
        self.size += tensor.numel() * tensor.element_size()
        self._pending[key] = tensor
        if self.size < STREAMED_FROM:
            return
        if self._stream is None:
            self._stream = open(self.file, "wb")
            self._stream.write(b" " * (8 + HEADER_ROOM))
        # Data may have no gaps, and readers want each tensor aligned to its element: odd sizes wait for the end.
        even = [name for name, waiting in self._pending.items() if waiting.numel() * waiting.element_size() % 8 == 0]
        for name in even:
            self._write(name, self._pending.pop(name))

    def close(self) -> None:
        if self._stream is None:
            # safetensors refuses views of one storage, as the experts of a fused tensor are.
            whole = {name: t if _owns_storage(t) else t.clone() for name, t in self._pending.items()}
            save_file(whole, str(self.file), metadata={"format": "pt"})
            self._pending = {}
            return
        for name in sorted(self._pending, key=lambda name: -self._pending[name].element_size()):
            self._write(name, self._pending[name])
        self._pending = {}
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > HEADER_ROOM:
            raise CheckpointError(f"{self.file.parent}: too many tensors for one shard. Lower --max_shard_size")
        self._stream.seek(0)
        self._stream.write(HEADER_ROOM.to_bytes(8, "little") + header)
        self._stream.close()

    def _write(self, name: str, tensor: Tensor) -> None:
        assert self._stream is not None
        size = tensor.numel() * tensor.element_size()
        offsets = [self._offset, self._offset + size]
        self._header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        self._offset += size


def clear_weights(folder: Path) -> None:
    """Removes weights of an earlier export, so that no stale shard is left beside new ones."""
    for file in [*folder.glob("*.safetensors"), *folder.glob(".part-*.safetensors"), folder / INDEX_NAME]:
        file.unlink(missing_ok=True)


def _owns_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _umask() -> int:
    """Returns the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
