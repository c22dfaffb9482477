"""The work folder of a run: one file per finished block, format-neutral, and the fingerprint of the run.

Every format is written from here, so several formats cost one tuning, and a run that was killed goes on behind its last
finished block. A file appears under its name only when it is whole (written beside, then renamed).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from auto_round.errors import CheckpointError, ResumeMismatchError
from auto_round.layouts.bit_pack import pack_bits, unpack_bits
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import TENSOR_FIELDS, BlockResult, QuantizedTensor

RUN_FILE = "run.json"
CHOSEN_FILE = "mixed_bits.json"  # which option each layer got, where that was measured; older than the store itself
# Beside the blocks, not in them: a stage that changes scales of all blocks is finished with one rename, or not at all.
SCALES_FILE = "end_to_end.safetensors"
HELD_OUT_FILE = "held_out.safetensors"
SHOWN_DIFFERENCES = 12
SCALE_FIELDS = ("scale", "global_scale", "offset", "super_scale", "super_offset")


class Results(Protocol):
    """Quantized blocks by name, as the check of a written checkpoint reads them."""

    def finished(self) -> Iterable[str]:
        """Returns the names of the blocks that are there."""
        ...

    def load(self, block: str) -> BlockResult:
        """Returns the result of a block."""
        ...

    def plain(self, block: str) -> dict[str, Tensor]:
        """Returns tuned tensors in 16 bits."""
        ...

    def cache_scales(self, block: str) -> dict[str, Tensor]:
        """Returns scales of an FP8 key/value cache."""
        ...


class RunStore:
    """Results of finished blocks, by block name.

    Args:
        folder: the work folder; made if it is not there.
        fingerprint: everything that results depend on, as plain JSON values.
        resume: keep finished blocks of an earlier run with the same fingerprint; else start anew.
    Raises:
        CheckpointError: `resume`, and the folder's fingerprint is damaged.
        ResumeMismatchError: `resume`, and the folder belongs to a run with other options; the difference is listed.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.blocks = folder / "blocks"
        stored = self._read_fingerprint() if resume else None
        if stored is not None:
            _check_same(stored, _plain(fingerprint), folder)
        else:
            self.clear()
        self.blocks.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / RUN_FILE, json.dumps(_plain(fingerprint), indent=1))

    @classmethod
    def existing(cls, folder: Path) -> RunStore:
        """Returns the store in a folder of an earlier run.

        Raises:
            CheckpointError: there is none.
        """
        store = cls.__new__(cls)
        store.folder, store.blocks = folder, folder / "blocks"
        if store._read_fingerprint() is None:
            raise CheckpointError(f"{folder} holds no finished run (no {RUN_FILE})")
        return store

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on."""
        return self._read_fingerprint() or {}

    def has(self, block: str) -> bool:
        """Whether a block is finished."""
        return self._file(block).is_file()

    def save(self, block: str, result: BlockResult) -> None:
        """Stores what tuning a block gave. Scales that were saved for the blocks as they were do not count any more."""
        self.drop_scales()
        tensors: dict[str, Tensor] = {}
        schemes = {}
        for name, weight in result.weights.items():
            scheme = weight.scheme
            schemes[name] = {"scheme": scheme.to_dict(), "shape": list(weight.shape)}
            tensors[f"{name}|codes"] = pack_bits(weight.codes.cpu(), scheme.bits)
            for field in TENSOR_FIELDS[1:]:
                tensor = getattr(weight, field)
                if tensor is not None:
                    tensors[f"{name}|{field}"] = tensor.cpu().contiguous()
        for kind, found in (("plain", result.plain), ("cache_scale", result.cache_scales)):
            tensors |= {f"{name}|{kind}": tensor.cpu().contiguous() for name, tensor in found.items()}
        metadata = {"schemes": json.dumps(schemes), "summary": json.dumps(result.summary())}
        _save_whole(self._file(block), tensors, metadata)

    def load(self, block: str) -> BlockResult:
        """Returns what `save` was given.

        Raises:
            CheckpointError: the block is not finished, or its file is damaged.
        """
        if not self.has(block):
            raise CheckpointError(f"{self.folder}: block {block} is not finished")
        return self._with_saved_scales(self._load(block))

    def save_scales(self, weights: Mapping[str, QuantizedTensor], options: Mapping[str, Any], **summary: Any) -> None:
        """Stores scales that take the place of those in the blocks' files whenever a block is loaded.

        Args:
            weights: those whose scales changed.
            options: everything that they depend on besides blocks and fingerprint.
            summary: plain JSON values, for people.
        """
        tensors = {
            f"{name}|{field}": tensor.cpu().contiguous()
            for name, weight in weights.items()
            for field in SCALE_FIELDS
            if (tensor := getattr(weight, field)) is not None
        }
        metadata = {"options": json.dumps(_plain(options)), "summary": json.dumps(summary)}
        _save_whole(self._scales_file, tensors, metadata)

    def scales_record(self) -> dict[str, Any]:
        """Returns {"options", "summary"} as `save_scales` was given them; empty if it was not called.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self._scales_file.is_file():
            return {}
        with self._opened(self._scales_file) as handle:
            metadata = handle.metadata()
        return {name: json.loads(metadata[name]) for name in ("options", "summary")}

    def drop_scales(self) -> None:
        """Makes the blocks' own scales count again."""
        self._scales_file.unlink(missing_ok=True)

    def save_held_out(self, tensors: Mapping[str, Tensor], about: str) -> None:
        """Stores samples to measure on once everything is written, and a line about them; there may be none."""
        _save_whole(self.folder / HELD_OUT_FILE, dict(tensors), {"about": about})

    def held_out(self) -> tuple[dict[str, Tensor], str]:
        """Returns what `save_held_out` was given; nothing and "" if it was not called.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self.folder / HELD_OUT_FILE
        if not file.is_file():
            return {}, ""
        with self._opened(file) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()["about"]

    def cache_scales(self, block: str) -> dict[str, Tensor]:
        """Returns only the scales of an FP8 key/value cache of a finished block."""
        with self._opened(self._file(block)) as handle:
            return _ending(handle, "|cache_scale")

    def plain(self, block: str) -> dict[str, Tensor]:
        """Returns only the tuned 16-bit values of a finished block; its codes stay packed on disk.

        Raises:
            CheckpointError: the block's file is damaged.
        """
        with self._opened(self._file(block)) as handle:
            return _ending(handle, "|plain")

    def _load(self, block: str) -> BlockResult:
        weights: dict[str, QuantizedTensor] = {}
        with self._opened(self._file(block)) as handle:
            metadata = handle.metadata()
            schemes = json.loads(metadata["schemes"])
            keys = set(handle.keys())
            for name, entry in schemes.items():
                scheme = QuantizationScheme.from_dict(entry["scheme"])
                codes = unpack_bits(handle.get_tensor(f"{name}|codes"), scheme.bits, entry["shape"][1])
                stored = (field for field in TENSOR_FIELDS[1:] if f"{name}|{field}" in keys)
                fields: dict[str, Any] = dict.fromkeys(TENSOR_FIELDS[1:])
                fields |= {field: handle.get_tensor(f"{name}|{field}") for field in stored}
                weights[name] = QuantizedTensor(codes=codes, scheme=scheme, **fields)
            plain = _ending(handle, "|plain")
            cache_scales = _ending(handle, "|cache_scale")
        return BlockResult(weights, plain, cache_scales=cache_scales, **json.loads(metadata["summary"]))

    def finished(self) -> Iterator[str]:
        """Yields the names of finished blocks, in name order of their files."""
        for file in sorted(self.blocks.glob("*.safetensors")):
            yield file.stem

    def clear(self) -> None:
        """Removes every result; the folder itself stays."""
        single = (self._scales_file, self.folder / HELD_OUT_FILE)
        own = (*single, *(file.with_suffix(".partial") for file in single), self.folder / RUN_FILE)
        for file in [*self.blocks.glob("*.safetensors"), *self.blocks.glob("*.partial"), *own]:
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the results and the folder, if nothing else is in it."""
        self.clear()
        (self.folder / CHOSEN_FILE).unlink(missing_ok=True)
        for folder in (self.blocks, self.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _file(self, block: str) -> Path:
        return self.blocks / f"{block}.safetensors"

    @property
    def _scales_file(self) -> Path:
        return self.folder / SCALES_FILE

    def _with_saved_scales(self, result: BlockResult) -> BlockResult:
        if not self._scales_file.is_file():
            return result
        weights = dict(result.weights)
        with self._opened(self._scales_file) as handle:
            keys = set(handle.keys())
            for name, weight in weights.items():
                saved = {f: handle.get_tensor(f"{name}|{f}") for f in SCALE_FIELDS if f"{name}|{f}" in keys}
                weights[name] = dataclasses.replace(weight, **saved)
        return dataclasses.replace(result, weights=weights)

    @staticmethod
    @contextlib.contextmanager
    def _opened(file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as handle:
                yield handle
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}). Remove it; --resume redoes it") from error

    def _read_fingerprint(self) -> dict[str, Any] | None:
        file = self.folder / RUN_FILE
        if not file.is_file():
            return None
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged ({error}). Start anew without --resume") from error


def _ending(handle: Any, end: str) -> dict[str, Tensor]:
    """Returns the tensors whose stored names have an ending, by what stands before it."""
    return {key.removesuffix(end): handle.get_tensor(key) for key in handle.keys() if key.endswith(end)}


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(fingerprint, sort_keys=True, default=str)))


def _check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    then, now = _flat(stored), _flat(wanted)
    names = [name for name in sorted(set(then) | set(now)) if then.get(name) != now.get(name)]
    changed = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in names[:SHOWN_DIFFERENCES]]
    changed += [f"and {len(names) - SHOWN_DIFFERENCES} more"] if len(names) > SHOWN_DIFFERENCES else []
    if changed:
        raise ResumeMismatchError(
            f"{folder} belongs to a run with other options, so its blocks cannot be used:\n  "
            + "\n  ".join(changed)
            + "\nRepeat the run with the options of then, or start anew without --resume"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _save_whole(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    save_file(tensors, str(partial), metadata=metadata)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    partial.rename(file)


def _write_whole(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
