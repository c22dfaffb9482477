"""What the devices of this machine can do, where a backend depends on it. Asked of PyTorch, never timed."""

from __future__ import annotations

import torch


def why_not_cuda(device: str, capability: tuple[int, int]) -> str | None:
    """Returns why the CUDA device here has not at least the compute capability; None for others, or where none is."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return "a ROCm device (only CUDA)"
    found = torch.cuda.get_device_capability()
    if found >= capability:
        return None
    return f"CUDA compute capability {'.'.join(map(str, found))} (only {'.'.join(map(str, capability))} and later)"


def why_not_vnni(device: str) -> str | None:
    """Returns why integer products on the CPU here are not to be used, or None.

    Without AVX512-VNNI oneDNN adds 8-bit products in pairs that saturate at 16 bits: the sums would be wrong.
    """
    return "a processor without AVX512-VNNI" if device == "cpu" and not torch.cpu._is_vnni_supported() else None
