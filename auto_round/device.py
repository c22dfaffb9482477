"""Where things run: device names as users write them, the precision blocks run in, and repeatable kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.errors import ConfigError

logger = logging.getLogger(__name__)


def compute_device(name: str | int | None) -> torch.device:
    """Returns the device for "auto", "cpu", "cuda", "cuda:1", "1", "xpu" ...; ranks of one host take one GPU each.

    Raises:
        ConfigError: it does not exist here.
    """
    wanted = "auto" if name is None else str(name)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    elif wanted.isdigit():
        wanted = f"cuda:{wanted}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device '{name}' cannot be used ({first}). Use auto, cpu, cuda, cuda:<n> or xpu") from error
    if device.type == "cuda" and device.index is None and distributed.world_size() > 1:
        device = torch.device("cuda", distributed.rank() % torch.cuda.device_count())
    return device


def compute_dtype(device: torch.device, stored: torch.dtype, *, amp: bool) -> torch.dtype:
    """Returns the precision that blocks run in: 16 bits on GPUs (`amp`), float32 on CPUs, where it is also faster."""
    if device.type == "cpu" or not amp:
        return torch.float32
    return torch.float16 if stored == torch.float16 else torch.bfloat16


def empty_near(device: torch.device, storage: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialised tensor on `storage`, for data that go between there and the compute device `device`.

    In host memory beside a GPU it is pinned: only such copies run at the full speed of the bus, and beside other work.
    Where the system grants no more pinned memory it is pageable, which is slower and nothing else.
    """
    if storage.type == "cpu" and device.type == "cuda":
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            logger.warning("host memory cannot be pinned (%s); copies will be slower", str(error).splitlines()[0])
    return torch.empty(tuple(shape), dtype=dtype, device=storage)


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels run where a tensor is: on NVIDIA GPUs, and on CPUs in Triton's interpreter."""
    return _is_interpreted() or (tensor.is_cuda and _has_triton() and torch.version.hip is None)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported."""
    if not _has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@contextlib.contextmanager
def repeatable_kernels() -> Iterator[None]:
    """Makes torch choose repeatable kernels for the time of a run, then restores what was set before."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
