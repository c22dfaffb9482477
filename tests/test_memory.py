"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

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
