"""Reads calibration data given as Python objects: texts, token ids, dicts of them, DataLoaders, any iterable.

It sorts out what each item is and checks token ids. It must not know a tokenizer, nor how samples are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auto_round.calibration.base import Document, ReadLimit, count_chars, document_of, is_messages
from auto_round.errors import ConfigError

ACCEPTED = (
    "strings, token ids (lists of ints, 1-D or 2-D integer tensors), dicts with input_ids, text or messages, "
    "or an iterable of these such as a DataLoader"
)


@dataclass
class Samples:
    """What was read: only one of both lists is filled.

    Args:
        documents: texts and conversations.
        rows: token ids, (T,) int64 on the CPU each.
    """

    documents: list[Document] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, item: Document | Tensor) -> None:
        """Appends a document or a row of token ids.

        Raises:
            ConfigError: there are items of the other kind already.
        """
        if isinstance(item, Tensor):
            self.rows.append(item)
        else:
            self.documents.append(item)
        if self.rows and self.documents:
            raise ConfigError("the calibration dataset mixes text and token ids. Give one kind")


def is_stream(dataset: Any) -> bool:
    """True for a flat sequence of token ids: a 1-D tensor or array, or a list of ints."""
    if isinstance(dataset, Tensor | np.ndarray):
        return dataset.ndim == 1
    return isinstance(dataset, list | tuple) and len(dataset) > 0 and _is_int(dataset[0])


def read_samples(dataset: Any, *, nsamples: int, text_limit: ReadLimit) -> Samples:
    """Returns the items of `dataset` in order.

    Lists, tuples, tensors and single dicts are read whole. Any other iterable may be endless, so it is read only until
    it gave `nsamples` rows of token ids, or texts up to `text_limit`.

    Raises:
        ConfigError: it is empty, of another type, mixes text and token ids, or its token ids are bad.
    """
    is_whole = isinstance(dataset, list | tuple | Mapping | Tensor | np.ndarray)
    items = [dataset] if isinstance(dataset, Mapping | Tensor | np.ndarray) or is_stream(dataset) else dataset
    try:
        iterator = iter(items)
    except TypeError:
        raise ConfigError(f"a calibration dataset cannot be a {type(dataset).__name__}. Give {ACCEPTED}") from None
    samples, n_chars = Samples(), 0
    for index, item in enumerate(iterator):
        for part in _flatten(item, f"item {index} of the calibration dataset"):
            samples.add(part)
            n_chars += 0 if isinstance(part, Tensor) else count_chars(part)
        n_documents = len(samples.documents)
        is_enough = n_documents > 0 and text_limit.is_reached(n_documents=n_documents, n_chars=n_chars)
        if not is_whole and (is_enough or len(samples.rows) >= nsamples):
            break
    if not samples.rows and not samples.documents:
        raise ConfigError(f"the calibration dataset is empty. Give {ACCEPTED}")
    return samples


def _flatten(item: Any, place: str) -> Iterator[Document | Tensor]:
    """Yields the documents or rows of one item, which may be a batch."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, Tensor | np.ndarray):
        yield from _rows(item, place)
    elif isinstance(item, Mapping):
        yield from _flatten_mapping(item, place)
    elif isinstance(item, list | tuple):
        yield from _flatten_sequence(item, place)
    else:
        raise ConfigError(f"{place} is a {type(item).__name__}. Give {ACCEPTED}")


def _flatten_mapping(item: Mapping[str, Any], place: str) -> Iterator[Document | Tensor]:
    if "input_ids" in item:
        yield from _unpadded_rows(item["input_ids"], item.get("attention_mask"), place)
    elif (document := document_of(item)) is not None:
        yield document
    elif (column := next((item[key] for key in ("text", "messages") if key in item), None)) is not None:
        yield from _flatten(column, place)
    else:
        keys = ", ".join(map(str, item)) or "none"
        raise ConfigError(f"{place} needs a key input_ids, text or messages; keys seen: {keys}")


def _flatten_sequence(item: Sequence[Any], place: str) -> Iterator[Document | Tensor]:
    if is_messages(item):
        yield list(item)
    elif item and _is_number(item[0]):
        yield from _rows(item, place)
    elif len(item) > 1 and isinstance(item[0], Tensor):
        # Inputs and labels, or (by the default collate function) one tensor for each position of the batch.
        raise ConfigError(
            f"{place} is a batch of {len(item)} tensors, which could be rows or columns. Give batches as one "
            "(samples, tokens) tensor or as dicts with input_ids"
        )
    else:
        for part in item:
            yield from _flatten(part, place)


def _unpadded_rows(ids: Any, mask: Any, place: str) -> Iterator[Tensor]:
    """Yields the real tokens of each row, so that padding on any side is undone."""
    rows = list(_rows(ids, f"{place}: input_ids"))
    if mask is None:
        yield from rows
        return
    masks = list(_integer_rows(mask, f"{place}: attention_mask"))
    if [len(row) for row in rows] != [len(row_mask) for row_mask in masks]:
        raise ConfigError(f"{place}: attention_mask has another shape than input_ids")
    for row, row_mask in zip(rows, masks, strict=True):
        if not bool(((row_mask == 0) | (row_mask == 1)).all()):
            raise ConfigError(f"{place}: attention_mask must hold only 0 and 1")
        yield row[row_mask.bool()]


def _rows(ids: Any, place: str) -> Iterator[Tensor]:
    """Yields checked token ids as (T,) int64 CPU tensors, one a row."""
    for row in _integer_rows(ids, place):
        if row.dtype == torch.bool:
            raise ConfigError(f"{place} is {row.dtype}; token ids are integers")
        row = row.to(torch.int64)
        if len(row) and int(row.min()) < 0:
            raise ConfigError(f"{place} holds {int(row.min())}; token ids are not negative (-100 marks labels)")
        yield row


def _integer_rows(values: Any, place: str) -> Iterator[Tensor]:
    """Yields (T,) integer or bool CPU tensors, one a row."""
    if isinstance(values, list | tuple) and values and not _is_number(values[0]):
        if len(values) > 1 and isinstance(values[0], Tensor):
            raise ConfigError(
                f"{place} is a list of {len(values)} tensors, which could be rows or columns (a DataLoader's default "
                "collate function makes columns of lists). Stack them, or set_format('torch') on the dataset"
            )
        for row in values:
            yield from _integer_rows(row, place)
        return
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{place} is no list or tensor of integers: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex():
        raise ConfigError(f"{place} is {tensor.dtype}; it must hold integers")
    if tensor.dim() not in (1, 2):
        raise ConfigError(f"{place} has {tensor.dim()} dimensions; it must be (tokens,) or (samples, tokens)")
    tensor = tensor.detach().cpu()
    yield from tensor if tensor.dim() == 2 else (tensor,)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Integral)
