import pytest
import torch

from auto_round import device

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def allocations(monkeypatch):
    """Records whether each tensor was asked for in pinned memory; pinning works here, whatever the machine has."""
    seen, empty = [], torch.empty

    def recorded(*shape, pin_memory=False, **options):
        seen.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    return seen


@pytest.mark.parametrize(
    ("compute", "pins"), [(GPU, True), (CPU, False), (torch.device("xpu"), False)], ids=["cuda", "cpu", "xpu"]
)
def test_host_memory_beside_a_gpu_is_pinned(compute, pins, allocations):
    tensor = device.empty_near(compute, CPU, (2, 3), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 3), torch.bfloat16, CPU)
    assert allocations == [pins]


def test_memory_that_cannot_be_pinned_is_pageable_and_told(monkeypatch, caplog):
    empty = torch.empty

    def refused(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refused)
    assert device.empty_near(GPU, CPU, (4,), torch.float32).shape == (4,)
    assert "cannot be pinned (CUDA error: out of memory)" in caplog.text
