import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from auto_round.calibration import CalibrationSet
from auto_round.config import TuneConfig
from auto_round.memory import LiveBytes
from auto_round.schemes import QuantizationScheme, to_scheme
from auto_round.tuning import tune
from auto_round.tuning.block_bytes import (
    BlockBytes,
    Choice,
    choices,
    converted_bytes,
    first_that_fits,
    measured_passes,
    weight_bytes,
)

GIB = 2**30
W4 = QuantizationScheme(bits=4, group_size=32)
W2A = QuantizationScheme(bits=2, group_size=32, sym=False)
# Sizes as of a Llama-3-8B block: 218M weights, 16 MiB of hidden states a sample, 128 samples, batches of 8.
LARGE = BlockBytes(
    held=GIB, chains=4 * GIB, sample=GIB // 64, tuned=int(1.25 * GIB), gradients=int(0.4 * GIB), sums=int(0.8 * GIB),
    converted=0, forward=int(0.4 * GIB), backward=GIB // 2, recomputed=int(0.4 * GIB), pieces=GIB, moving=0,
    step_samples=8,
)  # fmt: skip


def test_choices_go_from_the_cheapest_to_the_smallest():
    found = choices(8, may_offload=True, on_host=False, may_recompute=True)
    assert found == [
        Choice(on_host=False, micro_batch=8),
        *[Choice(on_host=True, micro_batch=size) for size in (8, 4, 2, 1)],
        Choice(on_host=True, micro_batch=1, recomputes=True),
    ]
    needs = [LARGE.needed(choice) for choice in found]
    assert needs[1:] == sorted(needs[1:], reverse=True)


def test_micro_batches_divide_the_batch():
    found = choices(6, may_offload=False, on_host=False, may_recompute=False)
    assert found == [Choice(on_host=False, micro_batch=size) for size in (6, 3, 2, 1)]


def test_activations_that_are_to_be_in_host_memory_are_there_in_every_choice():
    found = choices(2, may_offload=True, on_host=True, may_recompute=False)
    assert found == [Choice(on_host=True, micro_batch=2), Choice(on_host=True, micro_batch=1)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        # held + chains + tuned + inputs and targets of 8 samples + 8 passes + gradients
        (Choice(on_host=False, micro_batch=8), 1 + 4 + 1.25 + 0.25 + 4 + 0.4),
        # without chains, but the next batch is there as well
        (Choice(on_host=True, micro_batch=8), 1 + 1.25 + 0.5 + 4 + 0.4),
        # half a batch, and sums of gradients
        (Choice(on_host=True, micro_batch=4), 1 + 1.25 + 0.25 + 2 + 0.4 + 0.8),
        (Choice(on_host=True, micro_batch=1, recomputes=True), 1 + 1.25 + 0.0625 + 0.4 + 0.4 + 0.8),
    ],
)
def test_what_a_choice_needs_is_worked_by_hand(choice, expected):
    assert LARGE.needed(choice) / GIB == pytest.approx(expected, abs=1e-6)


def test_a_search_may_take_more_than_a_step():
    size = dataclasses.replace(LARGE, pieces=20 * GIB)
    assert size.needed(Choice(on_host=True, micro_batch=1)) == LARGE.held + LARGE.tuned + 20 * GIB


def test_without_steps_only_passes_count():
    size = dataclasses.replace(LARGE, backward=0, recomputed=0, pieces=0, converted=GIB)
    expected = LARGE.held + LARGE.tuned + GIB + 8 * (LARGE.forward + LARGE.sample)
    assert size.needed(Choice(on_host=True, micro_batch=8)) == expected


@pytest.mark.parametrize(("budget", "expected"), [(16, 0), (8, 1), (6, 2), (5, 3), (4.1, 4), (4, 5), (2, None)])
def test_the_first_choice_that_fits_is_taken(budget, expected):
    found = choices(8, may_offload=True, on_host=False, may_recompute=True)
    assert first_that_fits(found, LARGE, int(budget * GIB)) == expected


def count(task, config, choice):
    schemes = dict(task.schemes)
    forward, backward, recomputed = measured_passes(task.block, task.inputs[:1], schemes, config)
    return BlockBytes(
        held=0, chains=0, sample=task.inputs[0].nbytes, converted=converted_bytes(task.block), forward=forward,
        backward=backward, recomputed=recomputed, step_samples=config.batch_size,
        **weight_bytes(task.block, schemes, config),
    ).needed(choice)  # fmt: skip


def wide_llama():
    """Weights of up to half a million elements, so that tensors of weights and of samples both count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {
    "llama": lambda _make_model: wide_llama(),
    "llama-bf16": lambda _make_model: wide_llama().bfloat16(),
    "qwen3_moe": lambda make_model: make_model("qwen3_moe"),
    "gpt2": lambda make_model: make_model("gpt2"),
}


@pytest.mark.parametrize(
    ("kind", "scheme", "tokens", "choice", "options"),
    [
        ("llama", W4, 64, (8, False), {}),
        ("llama", W4, 64, (2, False), {}),
        ("llama", W2A, 64, (1, True), {}),
        ("llama", W2A, 8, (8, False), {"enable_alg_ext": True}),
        ("llama", W4, 8, (4, False), {"not_use_best_mse": False}),
        ("llama", W4, 8, (8, False), {"adam": True}),
        ("llama", W4, 8, (2, False), {"iters": 0}),
        ("llama", to_scheme("MXFP4"), 8, (8, False), {}),
        ("llama-bf16", W4, 64, (2, False), {}),
        ("llama-bf16", to_scheme("NVFP4"), 8, (8, False), {}),
        ("qwen3_moe", W4, 64, (4, False), {}),
        ("gpt2", W4, 64, (1, False), {}),
    ],
    ids=str,
)
def test_a_block_takes_no_more_than_is_counted_and_not_much_less(
    kind, scheme, tokens, choice, options, make_task, make_model, token_ids
):
    """Oracle: bytes of all tensors that live while the block is tuned, its weights and the activations aside."""
    micro_batch, recomputes = choice
    config = TuneConfig(**{"iters": 2, "batch_size": 8, **options})
    data = CalibrationSet(token_ids(8, tokens))
    task = make_task(scheme, model=MODELS[kind](make_model), data=data, batch_size=micro_batch)
    counted = count(task, config, Choice(on_host=False, micro_batch=micro_batch, recomputes=recomputes))
    block = dataclasses.replace(task.block, recomputes=recomputes)
    with LiveBytes() as live:
        tune(dataclasses.replace(task, block=block, micro_batch=micro_batch), config)
    assert live.peak <= counted <= 2.5 * live.peak


def test_recomputing_takes_less_for_a_pass(make_task):
    task = make_task(W4, model=wide_llama())
    _, backward, recomputed = measured_passes(task.block, task.inputs[:1], task.schemes, TuneConfig(iters=1))
    assert backward > recomputed > 0


def test_a_block_that_the_model_leaves_out_takes_nothing_to_pass(make_task):
    task = make_task(W4)
    calls = tuple(dataclasses.replace(calls, runs=False) for calls in task.block.calls)
    block = dataclasses.replace(task.block, calls=calls)
    assert measured_passes(block, task.inputs[:1], task.schemes, TuneConfig(iters=1)) == (0, 0, 0)
    assert measured_passes(task.block, task.inputs[:1], {}, TuneConfig(iters=1))[1:] == (0, 0)


def test_weights_in_another_precision_are_counted_as_converted(make_task, make_model):
    task = make_task(W4, model=make_model().bfloat16())
    stored = sum(tensor.numel() for tensor in task.block.tensors.values() if tensor.is_floating_point())
    assert converted_bytes(task.block) == 4 * stored
    assert converted_bytes(make_task(W4).block) == 0
