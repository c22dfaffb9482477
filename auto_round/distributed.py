"""Rank and world of torch.distributed, sums over ranks, and the rule that rank 0 writes.

Launched by torchrun; without it there is one rank and every function here is the identity.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Joins the process group that torchrun prepared; does nothing outside torchrun or if one exists."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Rank 0 alone measures perplexity and writes checkpoints; the others wait for it at a barrier.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=24))


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number, 0 to world_size() - 1."""
    return dist.get_rank() if world_size() > 1 else 0


def is_writer() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, the same bits on each; in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: int) -> int:
    """Returns the largest of all ranks' values."""
    if world_size() == 1:
        return value
    values: list[int] = [0] * world_size()
    dist.all_gather_object(values, value)
    return max(values)


def all_of(flags: Tensor) -> Tensor:
    """Returns which flags are set on all ranks, bool; the tensor itself without others."""
    if world_size() == 1:
        return flags
    unset = (~flags).int()
    dist.all_reduce(unset)
    return unset == 0


def fill_from_owners(tensor: Tensor, pieces: list[slice]) -> Tensor:
    """Completes a tensor of which rank r has computed the pieces r, r + world, r + 2 world ...; in place."""
    if world_size() > 1:
        for index, piece in enumerate(pieces):
            part = tensor[piece].contiguous()
            dist.broadcast(part, src=index % world_size())
            tensor[piece] = part
    return tensor


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()
