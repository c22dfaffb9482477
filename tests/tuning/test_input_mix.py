"""Which tokens of a block's input come from which chain."""

from __future__ import annotations

import dataclasses

import torch

from auto_round.schemes import QuantizationScheme
from auto_round.tuning import tune, tuner_for
from auto_round.tuning.block_error import BlockError
from auto_round.tuning.input_mix import PATTERNS, InputMix

CPU = torch.device("cpu")


def mixed(mix, samples, step):
    """Returns (B, T) bool, whether a token is the original's."""
    shape = (len(samples), mix.bits_NT.shape[1], 3)
    return mix(torch.zeros(shape), torch.ones(shape), samples, torch.tensor(step))[..., 0].bool()


def test_half_of_the_tokens_are_the_originals_and_whole_ones():
    mix = InputMix(64, 128, torch.Generator().manual_seed(0), CPU)
    quantized, original = torch.zeros(64, 128, 5), torch.ones(64, 128, 5)
    result = mix(quantized, original, torch.arange(64), torch.tensor(3))
    assert torch.equal(result[..., :1].expand_as(result), result)
    assert abs(float(result.mean()) - 0.5) < 5 * 0.5 / (64 * 128) ** 0.5


def test_each_step_chooses_anew_until_the_patterns_are_over():
    mix = InputMix(8, 256, torch.Generator().manual_seed(0), CPU)
    samples = torch.arange(8)
    seen = [mixed(mix, samples, step) for step in range(PATTERNS)]
    for first in range(PATTERNS):
        for second in range(first):
            assert 0.4 < float((seen[first] == seen[second]).float().mean()) < 0.6
    assert torch.equal(mixed(mix, samples, PATTERNS), seen[0])


def test_the_choice_belongs_to_the_sample_whatever_its_batch():
    mix = InputMix(8, 32, torch.Generator().manual_seed(1), CPU)
    together = mixed(mix, torch.tensor([5, 2, 7]), 4)
    assert torch.equal(together[1:], mixed(mix, torch.tensor([2, 7]), 4))


def test_steps_see_the_mixture_and_reported_losses_do_not(make_task):
    task = make_task(QuantizationScheme(bits=2, group_size=32))
    other = dataclasses.replace(task, original_inputs=task.inputs + 1)
    samples, replaced = torch.arange(4), {}
    mixing, plain = BlockError(other, 4, mixes=True), BlockError(other, 4)
    assert float(mixing.squared(samples, replaced, mixed=True)) != float(plain.squared(samples, replaced, mixed=True))
    assert mixing.mean(samples, replaced) == plain.mean(samples, replaced)
    assert BlockError(task, 4, mixes=True).mix is None  # the first block has one input only


def test_narrow_weights_are_tuned_on_the_mixture_unless_it_is_turned_off(make_task):
    from auto_round.config import TuneConfig

    assert tuner_for(TuneConfig(), [QuantizationScheme(bits=3), QuantizationScheme(bits=8)]).needs_original_inputs
    assert not tuner_for(TuneConfig(), [QuantizationScheme(bits=4)]).needs_original_inputs
    assert tuner_for(TuneConfig(enable_mixed_input=True), [QuantizationScheme(bits=8)]).needs_original_inputs
    assert not tuner_for(TuneConfig(enable_quanted_input=False), [QuantizationScheme(bits=2)]).needs_original_inputs
    task = make_task(QuantizationScheme(bits=2, group_size=32))
    task = dataclasses.replace(task, original_inputs=task.inputs + 0.5)
    options = {"iters": 8, "batch_size": 4}
    on, off = (tune(task, TuneConfig(**options, enable_mixed_input=way)) for way in (None, False))
    name = next(iter(task.schemes))
    assert not torch.equal(on.weights[name].codes, off.weights[name].codes)
