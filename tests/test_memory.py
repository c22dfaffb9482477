"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from auto_round import memory


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs glibc")
    pieces = [bytearray(64 << 10) for _ in range(1600)]  # 100 MB, below the size that is mapped for itself
    last = bytearray(64 << 10)  # stays at the end of the heap, so that freeing alone gives nothing back
    held = anonymous_bytes()
    del pieces
    memory.release_freed()
    assert held - anonymous_bytes() > 80 << 20
    assert len(last) == 64 << 10


def test_it_does_nothing_where_the_c_library_cannot(monkeypatch):
    memory._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    memory.release_freed()
    memory._trim.cache_clear()


def test_live_bytes_are_those_of_tensors_that_were_made_and_still_live():
    given = torch.ones(1000)
    with memory.LiveBytes() as live:
        kept = given * 2
        assert live.now == 4000
        view = kept.view(10, 100)[1:]
        kept.add_(1)
        assert live.now == live.peak == 4000
        dropped = torch.cat([kept, kept]).half()
        assert (live.now, live.peak) == (8000, 16000)  # 8000 in float32 for a moment
        del dropped, kept
        assert live.now == 4000  # the view holds the storage
        del view
        assert live.now == 0
        del given
        assert live.now == 0
    assert live.peak == 16000


def test_live_bytes_count_what_a_backward_pass_keeps_and_frees():
    weight = torch.ones(50, 100, requires_grad=True)
    with memory.LiveBytes() as live:
        output = (torch.ones(10, 100) @ weight.t()).relu()
        assert live.now == 4 * (10 * 100 + 10 * 50)  # the input, and the one output that relu keeps
        output.sum().backward()
        del output
        assert live.now == weight.grad.nbytes
        assert live.peak >= 4 * (1000 + 500 + 500 + 5000)
        weight.grad = None
        assert live.now == 0
