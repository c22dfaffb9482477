"""Turns documents into token windows: tokenize, then join and cut, or pad one by one.

Padding with a mask and joining both keep short documents; dropping them silently shrinks the calibration set.
This file must not know where documents come from. Shape suffixes: N samples, T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from auto_round.calibration.base import CalibrationSet, Document
from auto_round.calibration.chat import Text, render_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents given to the tokenizer at once: fast tokenizers use all cores on them, and the Python lists of ids, which
# take 8 times the memory of the text, stay few.
BATCH_DOCUMENTS = 256
# One token predicts nothing: a sample needs two.
MIN_TOKENS = 2


def tokenize_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool | None = None,
    system_prompt: str | None = None,
) -> list[Tensor]:
    """Returns the token ids of each document, with the special tokens the tokenizer itself adds.

    Blank documents are left out. A chat template writes its own special tokens, so none are added to its text.

    Args:
        documents: texts or conversations.
        apply_chat_template: see `chat.render_documents`.
        system_prompt: see `chat.render_documents`.
    Returns:
        (T,) int64 tensors of different lengths.
    Raises:
        ConfigError: a chat template is needed and the tokenizer has none.
    """
    texts = render_documents(documents, tokenizer, apply_chat_template=apply_chat_template, system_prompt=system_prompt)
    ids = []
    for is_templated, group in groupby((text for text in texts if text.text.strip()), lambda text: text.is_templated):
        run = list(group)
        for start in range(0, len(run), BATCH_DOCUMENTS):
            ids += _tokenize(run[start : start + BATCH_DOCUMENTS], tokenizer, has_special_tokens=is_templated)
    return ids


def _tokenize(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, *, has_special_tokens: bool) -> list[Tensor]:
    # verbose=False: no warning about texts longer than the model's context, they are cut below.
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=not has_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]


def join_windows(documents: Sequence[Tensor], seqlen: int, *, eos_id: int | None) -> Tensor:
    """Joins documents into one stream and cuts it into windows, so that no text is lost to padding.

    `eos_id` is put between two documents unless the first already ends with it; nothing is put before, after, or when
    it is None. What remains after the last full window is dropped, unless there is no full window.

    Args:
        documents: (T,) int64 each.
        seqlen: tokens of a window, at least 1.
    Returns:
        (N, seqlen) int64; (1, n) for a stream of n < seqlen tokens, (0, seqlen) for an empty one.
    """
    pieces: list[Tensor] = []
    for document in (document for document in documents if len(document)):
        if pieces and eos_id is not None and int(pieces[-1][-1]) != eos_id:
            pieces.append(torch.tensor([eos_id], dtype=torch.int64))
        pieces.append(document)
    if not pieces:
        return torch.empty((0, seqlen), dtype=torch.int64)
    stream = torch.cat(pieces)
    n_windows = len(stream) // seqlen
    return stream[: n_windows * seqlen].view(n_windows, seqlen) if n_windows else stream.view(1, -1)


def drop_short(documents: Sequence[Tensor]) -> list[Tensor]:
    """Returns the documents with at least two tokens."""
    return [document for document in documents if len(document) >= MIN_TOKENS]


def pad_documents(documents: Sequence[Tensor], seqlen: int, *, pad_id: int) -> CalibrationSet:
    """Makes one sample of each document: cut after `seqlen` tokens, padded on the right to the longest of them.

    Args:
        documents: (T,) int64 each, at least one; none is empty.
        pad_id: fills what is padded; the mask is False there.
    """
    cut = [document[:seqlen] for document in documents]
    lengths_N = torch.tensor([len(document) for document in cut])
    ids_NT = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=pad_id)
    return CalibrationSet(ids_NT, torch.arange(ids_NT.shape[1]) < lengths_N[:, None])


def choose_windows(n_windows: int, nsamples: int, seed: int) -> Tensor:
    """Returns which windows are used: the first `nsamples` of a random permutation, each at most once.

    The rule is a contract: accuracy measurements are repeated with it.

    Returns:
        (min(n_windows, nsamples),) int64 indices.
    """
    return torch.randperm(n_windows, generator=torch.Generator().manual_seed(seed))[:nsamples]
