import pytest
import torch

from auto_round.inference.machine import why_not_cuda, why_not_vnni


@pytest.mark.parametrize(("found", "is_able"), [((8, 9), True), ((9, 0), True), ((12, 0), True), ((8, 6), False)])
def test_a_device_needs_the_capability_or_a_later_one(monkeypatch, found, is_able):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert why_not_cuda("cpu", (8, 9)) is None
    reason = why_not_cuda("cuda", (8, 9))
    assert (reason is None) == is_able
    assert is_able or reason == "CUDA compute capability 8.6 (only 8.9 and later)"


def test_rocm_devices_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not_cuda("cuda", (8, 9)) == "a ROCm device (only CUDA)"


@pytest.mark.parametrize("has_vnni", [False, True])
def test_a_cpu_needs_vnni(monkeypatch, has_vnni):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    assert (why_not_vnni("cpu") is None) == has_vnni
    assert why_not_vnni("cuda") is None
