"""A model without its blocks: the tensors outside them, and batches that make it build its masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.errors import CheckpointError


def with_padded_row(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a batch with one more row, padded at its end, and its mask.

    A model leaves the mask out for a batch that nothing is padded in. The extra row makes it build one for every
    batch, so that samples of all batches can be mixed later; its results are dropped.
    """
    extra = torch.ones_like(mask[:1])
    extra[:, -1] = False
    return torch.cat([ids, ids[:1]]), torch.cat([mask, extra]).long()


def outside_tensors(source: WeightSource, groups: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns parameters and buffers outside the blocks, by name, tied ones once (functional_call ties them)."""
    inside = tuple(name + "." for group in groups for name in group)
    tensors = {n: source.read(k) for k, n in source.keys().items() if n is not None and not n.startswith(inside)}
    for name, buffer in source.model.named_buffers():
        if not name.startswith(inside) and not buffer.is_meta:
            tensors.setdefault(name, buffer)
    stored = {id(p) for n, p in source.model.named_parameters(remove_duplicate=False) if n in tensors}
    for name, parameter in source.model.named_parameters():
        if not name.startswith(inside) and name not in tensors and id(parameter) not in stored:
            tensors.update(_converted_tensors(source, name, inside))
    return tensors


def _converted_tensors(source: WeightSource, name: str, inside: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns a parameter that no stored tensor is a copy of (one of q, k, v that are stored as one), and its kin.

    Its source knows the module that the stored tensor belongs to, which may be some levels up.
    """
    place = name.rpartition(".")[0]
    while True:
        try:
            return source.tensors(place)
        except CheckpointError:
            place = place.rpartition(".")[0]
            if not place or any(block.startswith(place + ".") for block in inside):
                raise
