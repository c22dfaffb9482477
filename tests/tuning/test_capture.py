import pytest
import torch

from auto_round.tuning.capture import compiled_or_eager, repeat_on_device


def test_without_capture_the_step_itself_is_returned():
    def step(samples):
        raise AssertionError(samples)

    assert repeat_on_device(step, may_capture=False) is step


def running_sum():
    """Returns a step that adds the chosen rows to a total, and the total."""
    rows = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).cuda()
    total = torch.zeros(32, device="cuda")

    def step(samples):
        total.add_(rows[samples.to("cuda")].sum(0)).mul_(0.9)

    return step, total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_equal_eager_ones():
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:4] for seed in range(8)]
    orders.insert(5, torch.arange(3))  # another size goes its own way
    eager, eager_total = running_sum()
    step, captured_total = running_sum()
    captured = repeat_on_device(step, may_capture=True)
    for samples in orders:
        eager(samples)
        captured(samples)
    torch.cuda.synchronize()
    assert captured.graph is not None
    assert torch.equal(captured_total, eager_total)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_that_cannot_be_captured_goes_on_eagerly():
    total = torch.zeros((), device="cuda")

    def step(samples):
        total.add_(samples.sum() if int(samples.sum()) >= 0 else 0)  # int() synchronises, which a capture refuses

    captured = repeat_on_device(step, may_capture=True)
    for _ in range(5):
        captured(torch.arange(4))
    assert captured.failed
    assert float(total) == 5 * 6


def test_a_function_that_does_not_compile_goes_on_eagerly_for_good(monkeypatch, caplog):
    compiled_calls = []

    def broken(function):
        def call(*_args):
            compiled_calls.append(function)
            raise RuntimeError("no compiler here\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    double = compiled_or_eager(lambda x: x * 2)
    with caplog.at_level("WARNING"):
        assert [float(double(torch.tensor(value))) for value in (1.0, 2.0)] == [2.0, 4.0]
    assert len(compiled_calls) == 1
    assert caplog.text.count("no compiler here") == 1
    assert "long story" not in caplog.text


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch):
    def full(_function):
        def call(*_args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled_or_eager(lambda x: x * 2)(torch.tensor(1.0))
