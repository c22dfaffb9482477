import logging

import pytest
import torch

from auto_round import AutoRound
from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import ModuleSource
from auto_round.config import RunConfig
from auto_round.errors import ConfigError
from auto_round.models import discover
from auto_round.schemes import QuantizationScheme
from auto_round.tuning import memory_budget
from auto_round.tuning.block_bytes import BlockBytes, Choice
from auto_round.tuning.memory_budget import MemoryBudget

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
W4 = QuantizationScheme(bits=4, group_size=32)
OPTIONS = {"bits": 4, "group_size": 32, "iters": 2, "batch_size": 4, "device": "cpu", "seqlen": 16, "nsamples": 8}


def budget_of(device=CPU, **options):
    return MemoryBudget(RunConfig.from_options(**{"batch_size": 4, **options}), device, chains=2)


@pytest.fixture
def opened(make_model, token_ids):
    """Returns stream, first block and its schemes."""
    model = make_model()
    structure = discover(model)
    stream = BlockStream(
        ModuleSource(model), [(name,) for name in structure.blocks], CalibrationSet(token_ids(8, 16)), device=CPU,
        dtype=torch.float32, storage=CPU, batch_size=4, quantized_chain=True,
    )  # fmt: skip
    schemes = {linear.parameter: W4 for linear in structure.linears if linear.block == 0}
    return stream, stream.load(0), schemes


def sized(monkeypatch, budget, **changes):
    """Makes a budget see a block of round sizes: 1 GiB held, 4 GiB of chains, 2 GiB a sample's passes."""
    values = dict.fromkeys(BlockBytes.__dataclass_fields__, 0) | {
        "held": GIB, "chains": 4 * GIB, "backward": 2 * GIB, "recomputed": GIB, "step_samples": 4, **changes,
    }  # fmt: skip
    monkeypatch.setattr(budget, "count", lambda *_block: BlockBytes(**values))


def test_without_a_budget_on_a_cpu_nothing_is_measured(opened, monkeypatch):
    monkeypatch.setattr(memory_budget, "measured_passes", lambda *_args: pytest.fail("measured"))
    budget = budget_of()
    assert budget.total() is None
    assert budget.choose(*opened) == Choice(on_host=False, micro_batch=4)


def test_the_budget_of_a_gpu_is_what_is_free_and_what_torch_has_reserved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 2 * GIB)
    assert budget_of(GPU).total() == 7 * GIB
    assert budget_of(GPU, max_gpu_memory="3GiB").total() == 3 * GIB


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("20GiB", Choice(on_host=False, micro_batch=4)),  # 1 + 4 + 8 of 18.75
        ("10GiB", Choice(on_host=True, micro_batch=4)),  # 1 + 8 of 9.4
        ("6GiB", Choice(on_host=True, micro_batch=2)),
        ("3.3GiB", Choice(on_host=True, micro_batch=1)),
        ("2.2GiB", Choice(on_host=True, micro_batch=1, recomputes=True)),
    ],
)
def test_a_gpu_with_less_memory_gets_a_choice_that_takes_less(named, expected, opened, monkeypatch):
    budget = budget_of(GPU, max_gpu_memory=named)
    sized(monkeypatch, budget)
    assert budget.choose(*opened) == expected


def test_a_budget_that_nothing_fits_is_refused_with_the_smallest_that_would_do(opened, monkeypatch):
    budget = budget_of(GPU, max_gpu_memory="2GiB")
    sized(monkeypatch, budget)
    with pytest.raises(ConfigError, match=r"max_gpu_memory=2GiB .* too little for model\.layers\.0.* (\d+)MiB") as told:
        budget.choose(*opened)
    smallest = next(word for word in str(told.value).split() if word.endswith("MiB"))
    enough = budget_of(GPU, max_gpu_memory=smallest)
    sized(monkeypatch, enough)
    assert enough.choose(*opened).recomputes


def test_what_is_free_never_refuses(opened, monkeypatch):
    budget = budget_of(GPU)
    monkeypatch.setattr(budget, "total", lambda: GIB)
    sized(monkeypatch, budget)
    assert budget.choose(*opened) == budget.choices[-1]


def test_activations_stay_in_host_memory_once_they_are_there(opened, monkeypatch):
    budget = budget_of(GPU, max_gpu_memory="10GiB")
    sized(monkeypatch, budget)
    assert budget.choose(*opened).on_host
    sized(monkeypatch, budget, backward=0, pieces=0)
    assert budget.choose(*opened) == Choice(on_host=True, micro_batch=4)


def test_after_running_out_of_memory_less_is_taken_from_then_on(opened, monkeypatch):
    budget = budget_of(GPU, max_gpu_memory="20GiB")
    sized(monkeypatch, budget)
    first = budget.choose(*opened)
    second = budget.smaller(first)
    assert second == Choice(on_host=True, micro_batch=4)
    assert budget.choose(*opened) == second
    assert budget.smaller(budget.choices[-1]) is None


def test_a_choice_is_told_once_with_its_reason(opened, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    budget = budget_of(GPU, max_gpu_memory="10GiB")
    sized(monkeypatch, budget)
    budget.choose(*opened)
    budget.choose(*opened)
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == (
        "model.layers.0: memory budget 10.00 GiB: activations in host memory, micro-batches of 4 samples (9.00 GiB "
        "needed; 13.00 GiB with activations on the compute device, micro-batches of 4 samples)"
    )


@pytest.mark.parametrize(
    ("device", "options", "chain", "expected"),
    [
        (GPU, {"max_gpu_memory": "8GiB"}, GIB, False),
        (GPU, {"max_gpu_memory": "8GiB"}, 3 * GIB, True),
        (GPU, {"max_gpu_memory": "8GiB", "low_gpu_mem_usage": True}, 1, True),
        (CPU, {"max_gpu_memory": "8GiB", "low_gpu_mem_usage": True}, 3 * GIB, False),
    ],
)
def test_large_chains_are_recorded_in_host_memory(device, options, chain, expected):
    assert budget_of(device, **options).starts_on_host(chain) == expected


def test_codes_that_lie_beside_the_chains_count():
    budget = budget_of(GPU, max_gpu_memory="8GiB")
    assert not budget.starts_on_host(GIB, 3 * GIB)
    assert budget.starts_on_host(GIB, 5 * GIB)


def test_blocks_of_one_kind_are_measured_once(opened, monkeypatch):
    stream, first, schemes = opened
    calls, measure = [], memory_budget.measured_passes
    monkeypatch.setattr(memory_budget, "measured_passes", lambda *args: calls.append(1) or measure(*args))
    budget = budget_of(max_gpu_memory="1GiB")
    second = {name.replace("layers.0", "layers.1"): scheme for name, scheme in schemes.items()}
    sizes = [budget.count(stream, first, schemes), budget.count(stream, stream.load(1), second)]
    assert sizes[0] == sizes[1]
    assert sizes[0].chains == 2 * stream.quantized.nbytes
    assert len(calls) == 1


def quantized(model, token_ids, **options):
    quantizer = AutoRound(model, None, dataset=list(token_ids(8, 16)), **{**OPTIONS, **options})
    quantizer.quantize()
    return {name: tensor.clone() for name, tensor in quantizer.model.state_dict().items()}


def test_a_run_within_a_budget_gives_the_weights_of_one_without(make_model, token_ids, caplog):
    """Through the whole pipeline: micro-batches change sums in their last bits, and so a code here or there."""
    caplog.set_level(logging.INFO)
    free = quantized(make_model(), token_ids)
    with pytest.raises(ConfigError, match="max_gpu_memory=1KB") as told:
        quantized(make_model(), token_ids, max_gpu_memory="1KB")
    smallest = next(word for word in str(told.value).split() if word.endswith("MiB"))
    tight = quantized(make_model(), token_ids, max_gpu_memory=smallest)
    assert "micro-batches of" in caplog.text
    for name, tensor in free.items():
        assert (tensor != tight[name]).float().mean() < 0.03, name


def test_a_block_that_runs_out_of_memory_begins_anew_with_less(make_model, token_ids, monkeypatch, caplog):
    from auto_round import blockwise

    expected = quantized(make_model(), token_ids)
    tune, seen = blockwise.tune, []

    def short_of_memory(task, config):
        seen.append((task.block.name, task.micro_batch))
        if task.micro_batch == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return tune(task, config)

    monkeypatch.setattr(blockwise, "tune", short_of_memory)
    monkeypatch.setattr(MemoryBudget, "choose", lambda self, *_block: self.choices[self._least])
    found = quantized(make_model(), token_ids)
    assert seen == [("model.layers.0", 4), ("model.layers.0", 2), ("model.layers.1", 2)]
    assert "Once more with activations on the compute device, micro-batches of 2 samples" in caplog.text
    for name, tensor in expected.items():
        assert (tensor != found[name]).float().mean() < 0.03, name
