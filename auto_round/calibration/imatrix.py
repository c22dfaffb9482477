"""llama.cpp's importance matrices: mean squares of the inputs of each layer, read and written in both its forms.

The older form (usually .dat) has means times the number of chunks for each layer; the newer one is a GGUF file of sums
and token counts, with one row for each expert. Names are those of llama.cpp: "blk.0.attn_q.weight".

Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from auto_round.errors import CalibrationError, require

GGUF_MAGIC = b"GGUF"
SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ImportanceEntry:
    """What was seen of one layer's inputs.

    Attributes:
        sums: (E, I) float32 sums of squares, one row for each expert (E = 1 for other layers).
        counts: (E,) float32 tokens; in the older form chunks, and the rows of experts lie end to end in one.
    """

    sums: Tensor
    counts: Tensor

    def means(self) -> Tensor:
        """Returns (E, I) mean squares; ones for an expert that no token reached, as llama.cpp takes it."""
        counts_E1 = self.counts[:, None]
        return torch.where(counts_E1 > 0, self.sums / counts_E1.clamp(min=1), torch.ones_like(self.sums))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ImportanceMatrix:
    """A whole file.

    Attributes:
        entries: llama.cpp's tensor name -> entry.
        chunks: chunks of text that were run, 0 if the file does not say it.
        chunk_size: tokens of a chunk; 0 for the older form.
        datasets: names of the texts.
    """

    entries: Mapping[str, ImportanceEntry]
    chunks: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = ()


def read_imatrix(file: str | Path) -> ImportanceMatrix:
    """Returns an importance matrix in either form, told apart by the first bytes.

    Raises:
        CalibrationError: the file is damaged or no importance matrix.
        MissingDependencyError: it is a GGUF file, and the package gguf is missing.
    """
    with open(file, "rb") as handle:
        if handle.read(4) != GGUF_MAGIC:
            handle.seek(0)
            return _read_legacy(handle, str(file))
    return _read_gguf(Path(file))


def write_imatrix(file: str | Path, matrix: ImportanceMatrix) -> None:
    """Writes an importance matrix: in the older form if the name ends in ".dat", else as GGUF.

    Raises:
        MissingDependencyError: GGUF is wanted, and the package gguf is missing.
    """
    if Path(file).suffix == ".dat":
        _write_legacy(Path(file), matrix)
    else:
        _write_gguf(Path(file), matrix)


def _read_legacy(handle: BinaryIO, file: str) -> ImportanceMatrix:
    entries = {}
    for _ in range(_read_number(handle, file, at_least=1)):
        name = _take(handle, _read_number(handle, file, at_least=1), file).decode("utf-8", "replace")
        calls, size = _read_number(handle, file), _read_number(handle, file, at_least=1)
        values = np.frombuffer(_take(handle, 4 * size, file), dtype="<f4").astype(np.float32)
        # A file without calls has means, not sums.
        entries[name] = ImportanceEntry(torch.from_numpy(values)[None], torch.tensor([float(max(calls, 1))]))
    end = handle.read()  # number of chunks and name of the text; very old files end before them
    chunks = struct.unpack_from("<i", end)[0] if len(end) >= 4 else 0
    return ImportanceMatrix(entries, chunks, 0, (end[8:].decode("utf-8", "replace"),) if len(end) > 8 else ())


def _write_legacy(file: Path, matrix: ImportanceMatrix) -> None:
    names = sorted(name for name, entry in matrix.entries.items() if bool((entry.counts > 0).any()))
    with open(file, "wb") as handle:
        handle.write(struct.pack("<i", len(names)))
        for name in names:
            entry, encoded = matrix.entries[name], name.encode()
            most = int(entry.counts.max())
            calls = -(-most // matrix.chunk_size) if matrix.chunk_size else most
            values = (entry.means() * calls).flatten().numpy().astype("<f4")
            handle.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size))
            handle.write(values.tobytes())
        dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
        handle.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)


def _read_number(handle: BinaryIO, file: str, *, at_least: int = 0) -> int:
    (number,) = struct.unpack("<i", _take(handle, 4, file))
    if number < at_least:
        raise CalibrationError(f"{file} is no importance matrix (a count of {number} in it)")
    return int(number)


def _take(handle: BinaryIO, count: int, file: str) -> bytes:
    data = handle.read(count)
    if len(data) < count:
        raise CalibrationError(f"{file} is no importance matrix of llama.cpp, or cut off ({count} bytes more expected)")
    return data


def _read_gguf(file: Path) -> ImportanceMatrix:
    require("gguf", needed_for="reading an importance matrix in a GGUF file")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise CalibrationError(f"{file} is damaged ({error})") from error
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float32)) for tensor in reader.tensors}
    names = sorted(name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS))
    missing = [name for name in names if name + COUNTS not in tensors]
    if missing or not names:
        what = f"no counts for {missing[0]}" if missing else "no sums of squares in it"
        raise CalibrationError(f"{file} is no importance matrix ({what}). llama-imatrix writes one")
    entries = {}
    for name in names:
        counts = tensors[name + COUNTS].flatten()
        entries[name] = ImportanceEntry(tensors[name + SUMS].reshape(len(counts), -1), counts)

    def value(key: str, absent: Any) -> Any:
        field = reader.get_field(key)
        return absent if field is None else field.contents()

    return ImportanceMatrix(entries, int(value(CHUNKS, 0)), int(value(CHUNK_SIZE, 0)), tuple(value(DATASETS, ())))


def _write_gguf(file: Path, matrix: ImportanceMatrix) -> None:
    require("gguf", needed_for="writing an importance matrix as a GGUF file (a name that ends in .dat needs none)")
    import gguf

    writer = gguf.GGUFWriter(file, arch="")
    writer.add_type("imatrix")
    writer.add_array(DATASETS, list(matrix.datasets) or [""])
    writer.add_uint32(CHUNKS, matrix.chunks)
    writer.add_uint32(CHUNK_SIZE, matrix.chunk_size)
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        writer.add_tensor(name + SUMS, entry.sums.float().contiguous().numpy())
        writer.add_tensor(name + COUNTS, entry.counts.float()[:, None].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
