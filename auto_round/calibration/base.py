"""What calibration data is: fixed token windows, and the registry of named datasets they may come from.

This file must not know where text comes from or how it is tokenized. It imports torch only.
Shape suffixes: N samples, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import ConfigError
from auto_round.registry import Registry

# A document is plain text, or a conversation: messages such as {"role": "user", "content": "Hello"}.
Message = Mapping[str, Any]
Document = str | list[Message]

# Windows offered for each one drawn when a huge source is read in part, and characters of a token at most on average
# in common text: enough to choose from, and still only megabytes of text.
CHOICE_FACTOR = 4
CHARS_PER_TOKEN = 4


def is_messages(value: Any) -> bool:
    """True for a list of messages: each a mapping with `role` and `content`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def document_of(record: Mapping[str, Any]) -> Document | None:
    """Returns the document in a record: its "text", its "messages", or its only field; None when there is none."""
    candidates = [record[key] for key in ("text", "messages") if key in record]
    if not candidates and len(record) == 1:
        candidates = list(record.values())
    return next((value for value in candidates if isinstance(value, str) or is_messages(value)), None)


def count_chars(document: Document) -> int:
    """Returns how long a document is, in characters."""
    return len(document) if isinstance(document, str) else sum(len(str(message["content"])) for message in document)


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """The samples that a model is calibrated with.

    Args:
        input_ids: (N, T) int64 on the CPU, N and T at least 1, no negative values.
        attention_mask: (N, T) bool on the CPU, True where a token is real; every sample has a real token. None when
            nothing is padded; an all-True mask is stored as None.
        media: for each sample what the model takes besides (pixel values, sizes of pictures, kinds of tokens), the
            sample's own dimension first, or None for text.
        held_out: samples of the same source that were not drawn, to measure on; None if none were asked for or left.
    Raises:
        ConfigError: a shape, dtype, device or value is another.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    media: tuple[Mapping[str, Tensor], ...] | None = None
    held_out: CalibrationSet | None = None

    def __post_init__(self) -> None:
        ids = self.input_ids
        if ids.dim() != 2 or ids.numel() == 0 or ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise ConfigError(
                f"input_ids must be a (samples, tokens) int64 CPU tensor with at least one token, "
                f"not {tuple(ids.shape)} {ids.dtype} on {ids.device}"
            )
        if int(ids.min()) < 0:
            raise ConfigError(f"input_ids holds {int(ids.min())}; token ids are not negative")
        if self.media is not None and len(self.media) != len(ids):
            raise ConfigError(f"media of {len(self.media)} samples beside input_ids of {len(ids)}")
        if self.attention_mask is not None:
            self._check_mask(self.attention_mask)

    def media_of(self, samples: Tensor) -> dict[str, Tensor]:
        """Returns what the model takes besides tokens for some samples, joined in their first dimension."""
        if self.media is None:
            return {}
        chosen = [self.media[index] for index in samples.tolist()]
        return {name: torch.cat([sample[name] for sample in chosen]) for name in chosen[0]}

    def _check_mask(self, mask: Tensor) -> None:
        if mask.shape != self.input_ids.shape or mask.dtype != torch.bool or mask.device.type != "cpu":
            raise ConfigError(
                f"attention_mask must be a bool CPU tensor of shape {tuple(self.input_ids.shape)}, "
                f"not {tuple(mask.shape)} {mask.dtype} on {mask.device}"
            )
        if not bool(mask.any(dim=1).all()):
            raise ConfigError("attention_mask hides every token of a sample; leave that sample out")
        if bool(mask.all()):
            object.__setattr__(self, "attention_mask", None)

    @property
    def n_tokens(self) -> int:
        """The number of real (not padded) tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def merge_sets(sets: Sequence[CalibrationSet], *, pad_id: int) -> CalibrationSet:
    """Returns the samples of all sets in order, padded on the right to the widest one; the same for those held out.

    Args:
        sets: at least one.
        pad_id: fills what is padded; the mask is False there.
    """
    width = max(part.input_ids.shape[1] for part in sets)
    ids, masks = [], []
    for part in sets:
        missing = width - part.input_ids.shape[1]
        mask = torch.ones_like(part.input_ids, dtype=torch.bool) if part.attention_mask is None else part.attention_mask
        ids.append(torch.nn.functional.pad(part.input_ids, (0, missing), value=pad_id))
        masks.append(torch.nn.functional.pad(mask, (0, missing), value=False))
    rest = [part.held_out for part in sets if part.held_out is not None]
    held_out = merge_sets(rest, pad_id=pad_id) if rest else None
    return CalibrationSet(torch.cat(ids), torch.cat(masks), held_out=held_out)


@dataclass(frozen=True)
class ReadLimit:
    """How much of a huge or endless source is read: until both numbers are reached, or to its end."""

    n_documents: int
    n_chars: int

    @classmethod
    def to_join(cls, nsamples: int, seqlen: int) -> ReadLimit:
        """Returns the limit for documents that are joined and cut into windows of `seqlen` tokens."""
        return cls(n_documents=1, n_chars=nsamples * seqlen * CHOICE_FACTOR * CHARS_PER_TOKEN)

    @classmethod
    def to_pad(cls, nsamples: int) -> ReadLimit:
        """Returns the limit for documents that each make one sample."""
        return cls(n_documents=nsamples * CHOICE_FACTOR, n_chars=0)

    def is_reached(self, *, n_documents: int, n_chars: int) -> bool:
        """True when so much is enough."""
        return n_documents >= self.n_documents and n_chars >= self.n_chars


@dataclass(frozen=True)
class NamedDataset:
    """A dataset of the Hugging Face hub that `--dataset` knows by name.

    Args:
        hub_path: the repository, `owner/name`.
        document: turns a row into a document; a missing field is a KeyError.
        config_name: the repository's configuration, None for its default.
        default_splits: the splits read when none is asked for.
        is_streamed: too large to download whole; only its first documents are read (see `ReadLimit`).
        parquet_files: path pattern inside a repository that has a loading script, which `datasets` no longer runs.
        row_separator: rows are pieces of one text; they are joined with this into a single document.
    """

    hub_path: str
    document: Callable[[Mapping[str, Any]], Document]
    config_name: str | None = None
    default_splits: tuple[str, ...] = ("train",)
    is_streamed: bool = False
    parquet_files: str | None = None
    row_separator: str | None = None


DATASETS: Registry[NamedDataset] = Registry("dataset")
