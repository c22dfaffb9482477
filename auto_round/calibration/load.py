"""Loads calibration data from what a user gives: a dataset string, a path, Python objects or a finished set.

It connects the readers (local, hub, samples) with the window makers (text) and reports what came out. Nothing here
knows a model.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from auto_round.calibration.base import DATASETS, CalibrationSet, Document, ReadLimit, merge_sets
from auto_round.calibration.grammar import DatasetSpec, parse_datasets
from auto_round.calibration.hub import read_hub_documents
from auto_round.calibration.local import SUFFIXES, check_path, read_documents
from auto_round.calibration.samples import is_stream, read_samples
from auto_round.calibration.text import (
    MIN_TOKENS,
    choose_windows,
    drop_short,
    join_windows,
    pad_documents,
    tokenize_documents,
)
from auto_round.errors import CalibrationError, ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What is drawn from one dataset: at most `nsamples` samples of at most `seqlen` tokens, chosen by `seed`.

    Of what is left then, up to `held_out` samples are kept to measure on.
    """

    nsamples: int
    seqlen: int
    seed: int
    held_out: int = 0

    def __post_init__(self) -> None:
        if self.nsamples < 1 or self.seqlen < 2:
            raise ConfigError(
                f"calibration needs nsamples of at least 1 and seqlen of at least 2, "
                f"not nsamples={self.nsamples} and seqlen={self.seqlen}"
            )


def load_calibration(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 42,
    held_out: int = 0,
) -> CalibrationSet:
    """Returns calibration samples; the same arguments always give the same samples.

    Text is joined and cut into windows of `seqlen` tokens, unless its dataset says `concat=False`: then, and for token
    ids, each document is a sample, cut or padded on the right. The windows of each dataset are chosen by
    `text.choose_windows`, and no window twice. Logs how many samples and tokens there are.

    Args:
        dataset: a dataset string (see `grammar`); the path of a local file; a list or tuple of strings, of token id
            lists, of 1-D or 2-D tensors, or of dicts with input_ids (and attention_mask), text or messages; a
            DataLoader or any iterable of such items or batches, which is read only as far as needed; a flat sequence
            of token ids, which is cut into windows; a `CalibrationSet`, which is returned as it is.
        tokenizer: needed for text only.
        nsamples: samples altogether. Several datasets share them evenly, or as their `num=` says.
        seqlen: tokens of a sample.
        seed: of the choice.
        held_out: further samples, of what is left, that the result carries as its `held_out`.
    Returns:
        At most `nsamples` samples. Fewer, with a warning, when the data does not hold so many.
    Raises:
        ConfigError: bad options, an unknown dataset, a missing file, bad token ids, or text without a tokenizer.
        CalibrationError: data cannot be read, or is shorter than one window.
        MissingDependencyError: a named dataset without the package `datasets`.
    """
    if isinstance(dataset, CalibrationSet):
        log.info("calibration: %d samples with %d tokens, as given", len(dataset), dataset.n_tokens)
        return dataset
    budget = Budget(nsamples, seqlen, seed, held_out)
    drawn = draw_samples(dataset, tokenizer, budget)
    _report(drawn, budget)
    return drawn


def draw_samples(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, budget: Budget) -> CalibrationSet:
    """Returns samples of a dataset, as `load_calibration` does, for whatever they are used."""
    if isinstance(dataset, str | os.PathLike):
        return _draw_named(dataset, tokenizer, budget)
    return _draw_objects(dataset, tokenizer, budget)


def share_budget(nums: Sequence[int | None], nsamples: int) -> list[int]:
    """Returns how many of `nsamples` samples each dataset gives.

    Datasets without a number share what the numbers leave evenly, earlier ones take the remainder. When the numbers
    leave too little, all share evenly and a number is only the most that its dataset gives.

    Raises:
        ConfigError: there are more datasets than samples.
    """
    if len(nums) > nsamples:
        raise ConfigError(f"nsamples={nsamples} is fewer than the {len(nums)} datasets. Raise nsamples")
    fits = sum(num or 1 for num in nums) <= nsamples
    shares = [0] * len(nums)
    left = nsamples
    # Those bound by a number come first, smallest first: what they cannot take goes to the others.
    order = sorted(range(len(nums)), key=lambda index: (nums[index] is None, nums[index] or 0))
    for position, index in enumerate(order):
        num, n_waiting = nums[index], len(order) - position
        even = -(-left // n_waiting)
        shares[index] = num if fits and num is not None else min(even, num or even)
        left -= shares[index]
    return shares


def _draw_named(
    dataset: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None, budget: Budget
) -> CalibrationSet:
    if isinstance(dataset, os.PathLike):
        specs: tuple[DatasetSpec, ...] = (DatasetSpec(os.fspath(dataset)),)
    else:
        specs = parse_datasets(dataset)
    shares = share_budget([spec.num for spec in specs], budget.nsamples)
    # All names are checked before the first is loaded.
    for spec in specs:
        _check_source(spec)
    tokenizer = _require_tokenizer(tokenizer)
    drawn = []
    for spec, share in zip(specs, shares, strict=True):
        part = dataclasses.replace(budget, nsamples=share, held_out=-(-budget.held_out * share // budget.nsamples))
        ids = tokenize_documents(
            _read_source(spec, part),
            tokenizer,
            apply_chat_template=spec.apply_chat_template,
            system_prompt=spec.system_prompt,
        )
        draw = _draw_joined if spec.concat else _draw_padded
        drawn.append(draw(ids, part, spec.name, tokenizer))
    if all(spec.concat for spec in specs):
        _check_length(drawn, ", ".join(spec.name for spec in specs), budget, "with :concat=False")
    return merge_sets(drawn, pad_id=_pad_id(tokenizer))


def _is_local(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES or (name not in DATASETS and Path(name).expanduser().exists())


def _check_source(spec: DatasetSpec) -> None:
    """Checks that a dataset is a readable file or has a known name, without loading it."""
    if _is_local(spec.name):
        check_path(Path(spec.name).expanduser())
        if spec.splits not in ((), ("train",)):
            raise ConfigError(f"dataset {spec.name} is a local file, it has no split {'+'.join(spec.splits)}")
    elif spec.name not in DATASETS:
        raise ConfigError(
            f"dataset '{spec.name}' is no known name and no file.{nearest(spec.name, DATASETS)} "
            f"Known: {', '.join(sorted(DATASETS))}. Local files must be {', '.join(SUFFIXES)}"
        )


def _read_source(spec: DatasetSpec, budget: Budget) -> list[Document]:
    if _is_local(spec.name):
        return read_documents(Path(spec.name).expanduser())
    limit = ReadLimit.to_join(budget.nsamples, budget.seqlen) if spec.concat else ReadLimit.to_pad(budget.nsamples)
    return read_hub_documents(DATASETS[spec.name], spec.splits, limit)


def _draw_objects(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, budget: Budget) -> CalibrationSet:
    limit = ReadLimit.to_join(budget.nsamples, budget.seqlen)
    samples = read_samples(dataset, nsamples=budget.nsamples, text_limit=limit)
    name = "(Python objects)"
    if samples.rows and not is_stream(dataset):
        return _draw_padded(samples.rows, budget, name, tokenizer)
    ids = samples.rows or tokenize_documents(samples.documents, _require_tokenizer(tokenizer))
    drawn = _draw_joined(ids, budget, name, tokenizer)
    _check_length([drawn], name, budget, "by giving token ids of each")
    return drawn


def _draw_joined(
    documents: Sequence[Tensor], budget: Budget, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationSet:
    """Joins, cuts and chooses. A dataset shorter than one window gives all it has as one shorter sample."""
    windows = join_windows(documents, budget.seqlen, eos_id=None if tokenizer is None else tokenizer.eos_token_id)
    if windows.numel() < MIN_TOKENS:
        raise CalibrationError(f"the calibration dataset {name} has only {windows.numel()} tokens. Give more text")
    chosen = choose_windows(len(windows), budget.nsamples + budget.held_out, budget.seed)
    rest = windows[chosen[budget.nsamples :]]
    held_out = CalibrationSet(rest) if len(rest) else None
    return CalibrationSet(windows[chosen[: budget.nsamples]], held_out=held_out)


def _draw_padded(
    documents: Sequence[Tensor], budget: Budget, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> CalibrationSet:
    """Chooses documents, each cut and padded to one sample; those of fewer than two tokens cannot be used."""
    usable = drop_short(documents)
    if len(usable) < len(documents):
        log.warning("calibration dataset %s: %d samples have under two tokens", name, len(documents) - len(usable))
    if not usable:
        raise CalibrationError(f"the calibration dataset {name} has no sample of two tokens or more. Give more text")
    order = choose_windows(len(usable), budget.nsamples + budget.held_out, budget.seed).tolist()
    chosen = [usable[index] for index in order[: budget.nsamples]]
    rest = [usable[index] for index in order[budget.nsamples :]]
    n_cut = sum(len(document) > budget.seqlen for document in chosen)
    if n_cut:
        log.info("calibration dataset %s: %d samples are cut to seqlen=%d tokens", name, n_cut, budget.seqlen)
    pad_id = _pad_id(tokenizer)
    held_out = pad_documents(rest, budget.seqlen, pad_id=pad_id) if rest else None
    return dataclasses.replace(pad_documents(chosen, budget.seqlen, pad_id=pad_id), held_out=held_out)


def _check_length(drawn: Sequence[CalibrationSet], name: str, budget: Budget, how_to_pad: str) -> None:
    n_tokens = sum(samples.n_tokens for samples in drawn)
    if n_tokens < budget.seqlen:
        raise CalibrationError(
            f"the calibration dataset {name} has {n_tokens} tokens, one sample takes seqlen={budget.seqlen}. Give more "
            f"text, lower --seqlen to at most {n_tokens}, or pad each document to a sample {how_to_pad}"
        )


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ConfigError("calibration text needs a tokenizer. Give one, or give token ids (input_ids) as the dataset")
    return tokenizer


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Returns an id that exists in every vocabulary; which one does not matter, the mask hides it."""
    candidates = () if tokenizer is None else (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((candidate for candidate in candidates if candidate is not None), 0)


def _report(samples: CalibrationSet, budget: Budget) -> None:
    log.info("calibration: %d samples with %d tokens", len(samples), samples.n_tokens)
    if len(samples) < budget.nsamples:
        log.warning(
            "calibration: only %d of nsamples=%d samples (%d tokens). Give more text or lower seqlen for full accuracy",
            len(samples),
            budget.nsamples,
            samples.n_tokens,
        )
