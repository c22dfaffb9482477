"""What this machine's processor can do, where a choice of kernel depends on it. Asked of the system, never timed."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch


@functools.cache
def has_int8_dot_product() -> bool:
    """Returns whether 8-bit products are summed exactly and fast (AVX512-VNNI, which processors with AMX have too).

    Without it oneDNN adds products in pairs that saturate at 16 bits, so large codes would give wrong sums.
    """
    return torch.cpu._is_vnni_supported()


@functools.cache
def is_intel_with_vnni() -> bool:
    """Returns whether auto-round-lib has 8-bit kernels for this processor: it uses them on Intel's only."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        return _lists_intel_with_vnni(cpuinfo.read_text())
    return "GenuineIntel" in platform.processor() and has_int8_dot_product()


def _lists_intel_with_vnni(cpuinfo: str) -> bool:
    return "GenuineIntel" in cpuinfo and re.search(r"\bavx(512)?_vnni\b", cpuinfo) is not None
