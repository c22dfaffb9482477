"""Runs a written checkpoint forward on a few tokens, block by block, and tells where values stop being finite.

Packed weights are unpacked from the written files as they are needed, so this costs one read of the checkpoint and the
memory of one block. The forward pass is that of `blocks.py`; ranks do not share it, because only the writer checks.

Shape letters: N samples, T tokens, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import CheckpointSource
from auto_round.config import RunConfig
from auto_round.device import compute_device, compute_dtype
from auto_round.errors import CheckpointError
from auto_round.formats.written import WrittenCheckpoint, WrittenWeight, listed
from auto_round.memory import release_freed
from auto_round.models.auto_class import media_token_ids
from auto_round.models.base import head_name
from auto_round.stored_tensors import NamedTensors

SAMPLES, TOKENS, SEED = 2, 16, 0


@dataclasses.dataclass(frozen=True, slots=True)
class LogitsOutcome:
    """What the forward pass told.

    Attributes:
        summary: for the line that is logged.
        problems: what is wrong with the checkpoint.
        skipped: why nothing was computed ("" if it was).
    """

    summary: str
    problems: tuple[str, ...] = ()
    skipped: str = ""


class DenseTensors(NamedTensors):
    """The tensors of a written checkpoint under their original keys, packed weights dequantized when asked for.

    Dequantized weights have the dtype of the original: a block's forward pass converts them anyway, and a block held in
    float32 beside the intermediates of unpacking was the peak of memory.

    Args:
        weights: quantized weights by original key.
        device: where weights are unpacked.
    """

    def __init__(self, written: WrittenCheckpoint, weights: Mapping[str, WrittenWeight], device: torch.device) -> None:
        self.written, self.device = written, device
        self.packed = {key: weight for key, weight in weights.items() if weight.layout is not None}
        parts = {part for weight in self.packed.values() for part in weight.specs}
        self._keys = [*self.packed, *(key for key in written.specs if key not in parts)]

    def __getitem__(self, key: str) -> Tensor:
        weight = self.packed.get(key)
        if weight is None:
            return self.written.read(key)
        return weight.as_stored(weight.unpacked(self.written, self.device), weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def check_logits(
    written: WrittenCheckpoint, weights: Mapping[str, WrittenWeight], blocks: tuple[str, ...], config: RunConfig
) -> LogitsOutcome:
    """Returns whether the logits of a few random tokens are finite; the first block that breaks them is named.

    Args:
        weights: quantized weights by original key.
        blocks: names of the decoder layers.
    """
    try:
        return _forward(written, weights, blocks, config)
    except CheckpointError as error:
        return LogitsOutcome("logits not computed", (str(error),))
    except Exception as error:  # families that cannot be run block by block fail in ways that have nothing in common
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        return LogitsOutcome("logits not checked", skipped=reason)


@torch.no_grad()
def _forward(
    written: WrittenCheckpoint, weights: Mapping[str, WrittenWeight], blocks: tuple[str, ...], config: RunConfig
) -> LogitsOutcome:
    device = compute_device(config.device)
    stored = next(w.dtype for w in weights.values())
    dtype = compute_dtype(device, stored, amp=config.tune.amp)
    tensors = DenseTensors(written, weights, device)
    source = CheckpointSource.reopened(written.folder, tensors, trust_remote_code=config.trust_remote_code)
    data = CalibrationSet(_random_tokens(source, min(TOKENS, config.calib.seqlen)))
    groups = [(name,) for name in blocks]
    stream = BlockStream(
        source, groups, data, device=device, dtype=dtype, storage=device, batch_size=SAMPLES, quantized_chain=False
    )
    hidden_NTH = stream.quantized
    if not _finite(hidden_NTH):
        return _broken("the embedding", {}, dtype)
    for index, name in enumerate(blocks):
        hidden_NTH, tensors_of_block = _through_block(stream, index, stream.before(index, hidden_NTH))
        if not _finite(hidden_NTH):
            return _broken(f"block {name}", tensors_of_block, dtype)
        del tensors_of_block  # else two blocks would be held while the next one is read
        release_freed()
    head = head_name(source.model)
    if head is None:
        return LogitsOutcome("outputs finite")
    seen_NTH = stream.head_inputs(head, hidden_NTH)
    state = {name[len(head) + 1 :]: tensor.to(device, dtype) for name, tensor in source.tensors(head).items()}
    if not _finite(functional_call(source.model.get_submodule(head), state, (seen_NTH,))):
        return _broken(f"the output layer {head}, or the norm before it,", state, dtype)
    return LogitsOutcome("logits finite")


def _through_block(stream: BlockStream, index: int, hidden_NTH: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Returns a block's output and its tensors."""
    block = stream.load(index)
    return block.forward(hidden_NTH, torch.arange(len(hidden_NTH))), block.tensors


def _random_tokens(source: CheckpointSource, length: int) -> Tensor:
    """Returns (SAMPLES, length) ids of words; those that stand for pictures would want a picture."""
    words = source.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
    ids = torch.randint(words, (SAMPLES, length), generator=torch.Generator().manual_seed(SEED))
    media = torch.tensor(sorted(media_token_ids(source.model.config)), dtype=ids.dtype)
    ordinary = next(word for word in range(words) if word not in media)
    return torch.where(torch.isin(ids, media), ordinary, ids)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _broken(where: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> LogitsOutcome:
    bad = listed("; infinity or NaN in", (name for name, tensor in tensors.items() if not _finite(tensor)))
    overflow = f"; its weights are finite, so it may overflow in {str(dtype).removeprefix('torch.')}"
    why = bad[0] if bad else overflow if tensors else ""
    return LogitsOutcome("logits not finite", (f"{where} gives values that are not finite on random tokens{why}",))
