"""Calibration data under the names that callers of earlier versions import; `auto_round.calibration` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader

from auto_round.calibration import DATASETS, load_calibration
from auto_round.calibration.named import DEFAULT_DATASET

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIB_DATASETS = DATASETS


def get_dataset(
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    dataset_name: Any = DEFAULT_DATASET,
    seed: int = 42,
    nsamples: int = 512,
) -> list[dict[str, Tensor]]:
    """Returns the samples one by one: {"input_ids": (T,) int64, "attention_mask": (T,) int64 of 0 and 1}.

    Args:
        dataset_name: anything `load_calibration` takes.
    Raises:
        ConfigError, CalibrationError, MissingDependencyError: see `load_calibration`.
    """
    samples = load_calibration(dataset_name, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed)
    ids = samples.input_ids
    mask = ids.new_ones(ids.shape) if samples.attention_mask is None else samples.attention_mask.long()
    return [{"input_ids": row, "attention_mask": row_mask} for row, row_mask in zip(ids, mask, strict=True)]


def get_dataloader(
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    dataset_name: Any = DEFAULT_DATASET,
    seed: int = 42,
    bs: int = 8,
    nsamples: int = 512,
) -> DataLoader:
    """Returns the samples of `get_dataset` in their order, in batches of `bs` as (B, T) tensors."""
    return DataLoader(get_dataset(tokenizer, seqlen, dataset_name, seed, nsamples), batch_size=bs, shuffle=False)
