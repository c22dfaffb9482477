"""llama.cpp's importance matrices against a model's weights: their tensors are those of a GGUF file.

A file that llama-imatrix wrote says how strongly each input channel of each layer is used, so that scales can be
searched without calibration text; and what was measured here goes into such a file for llama-quantize. Only names and
shapes are looked at. Embedding and output layer, which llama-imatrix leaves out, may be missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from auto_round.calibration.imatrix import ImportanceEntry, ImportanceMatrix, read_imatrix, write_imatrix
from auto_round.channels import ChannelSums
from auto_round.checkpoint import WeightSource
from auto_round.errors import CalibrationError
from auto_round.formats.gguf.contents import EMBEDDING, OUTPUT, Contents, FileTensor, contents_of
from auto_round.models.base import ModelStructure

OPTIONAL = (EMBEDDING, OUTPUT)


def read_importance(file: str | Path, contents: Contents, weights: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Returns parameter name -> (I,) mean squares of the weight's input channels, float32.

    Args:
        contents: the GGUF file that the model would become.
        weights: parameter name -> (O, I) shape of the weights to quantize.
    Raises:
        CalibrationError: no such file, no importance matrix, or one of another model: all missing tensors and wrong
            widths are named together.
    """
    matrix = _read(file)
    rows = _rows_of_parameters(contents)
    found: dict[str, Tensor] = {}
    missing, wrong = [], []
    for parameter, (_, width) in weights.items():
        tensor, index = rows.get(parameter, (None, 0))
        if tensor is None:
            continue  # it is rearranged, or shares the embedding's tensor
        entry = matrix.entries.get(tensor.name)
        if entry is None:
            missing += [] if tensor.name in OPTIONAL else [f"{tensor.name} ({parameter})"]
            continue
        experts = max(len(tensor.parts), 1)
        if entry.sums.numel() != experts * width:
            of_experts = f"{experts} experts of " if experts > 1 else ""
            wrong.append(f"{tensor.name} has {entry.sums.numel()} channels (the model: {of_experts}{width})")
            continue
        found[parameter] = mean_rows(entry, experts)[index]
    problems = [f"no entry for {len(missing)} tensors, e.g. {', '.join(missing[:3])}"] if missing else []
    problems += [f"{len(wrong)} entries of another width: {', '.join(wrong[:3])}"] if wrong else []
    if problems:
        raise CalibrationError(
            f"imatrix {file} does not fit the model: {'; '.join(problems)}. Give the file that llama-imatrix or "
            "--write_imatrix made of this model, on text that reaches all its experts"
        )
    return found


def mean_rows(entry: ImportanceEntry, rows: int) -> Tensor:
    """Returns (rows, I) mean squares; the older form has all experts end to end."""
    return entry.means().reshape(rows, -1)


def importance_of_model(
    file: str | Path, source: WeightSource, structure: ModelStructure, weights: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Returns `read_importance` for a model.

    Raises:
        UnsupportedError: llama.cpp's names of its tensors are not known.
    """
    return read_importance(file, contents_of(source, structure), weights)


def importance_of_tensors(file: str | Path | None) -> Callable[[FileTensor], Tensor | None]:
    """Returns a function from a tensor of a GGUF file to its mean squares (rows, I), None where there are none.

    It serves tensors whose values are rearranged while they are written, which no parameter stands for.
    """
    matrix = ImportanceMatrix({}) if file is None else _read(file)

    def find(tensor: FileTensor) -> Tensor | None:
        entry, width = matrix.entries.get(tensor.name), tensor.shape[-1]
        if entry is None or entry.sums.numel() not in (width, width * tensor.shape[0]):
            return None
        return mean_rows(entry, entry.sums.numel() // width)

    return find


class MeasuredImportance:
    """Collects what calibration shows of each layer, to be written when all have been seen."""

    def __init__(self) -> None:
        self._sums: dict[str, ChannelSums] = {}

    def add(self, sums: Mapping[str, ChannelSums]) -> None:
        """Adds layers by parameter name; an expert that no token reached may be missing."""
        self._sums |= {name: ChannelSums(one.squares.cpu(), one.tokens) for name, one in sums.items()}

    def write(
        self,
        file: str | Path,
        source: WeightSource,
        structure: ModelStructure,
        *,
        samples: tuple[int, int],
        dataset: str,
    ) -> None:
        """Writes an importance matrix: the older form for a name that ends in ".dat", else GGUF.

        Args:
            samples: number and length of the calibration samples.
            dataset: what they are called in the file.
        """
        entries = {}
        for tensor in contents_of(source, structure).tensors:
            measured = [self._sums.get(parameter) for parameter in tensor.parameters]
            width = next((len(one.squares) for one in measured if one is not None), None)
            if width is None:
                continue
            squares = [torch.zeros(width) if one is None else one.squares for one in measured]
            tokens = torch.tensor([0.0 if one is None else float(one.tokens) for one in measured])
            entries[tensor.name] = ImportanceEntry(torch.stack(squares), tokens)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_imatrix(file, ImportanceMatrix(entries, *samples, datasets=(dataset,)))


@functools.lru_cache(maxsize=1)
def _read_once(file: str, _changed: int) -> ImportanceMatrix:
    return read_imatrix(file)


def _read(file: str | Path) -> ImportanceMatrix:
    path = Path(file)
    if not path.is_file():
        raise CalibrationError(f"imatrix {file}: there is no such file. llama-imatrix or --write_imatrix writes one")
    return _read_once(str(path), path.stat().st_mtime_ns)


def _rows_of_parameters(contents: Contents) -> dict[str, tuple[FileTensor, int]]:
    """Returns parameter name -> the tensor that holds it, and which of its experts it is."""
    return {
        parameter: (tensor, index) for tensor in contents.tensors for index, parameter in enumerate(tensor.parameters)
    }
