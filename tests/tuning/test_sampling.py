from itertools import islice

import pytest
import torch

from auto_round.config import TuneConfig
from auto_round.tuning.sampling import sample_order


def steps(count, number, *, seed=0, **options):
    config = TuneConfig(**options)
    return list(islice(sample_order(count, config, torch.Generator().manual_seed(seed)), number))


@pytest.mark.parametrize("sampler", ["rand", "epoch"])
def test_a_step_sees_distinct_samples_of_batch_size_times_accumulation(sampler):
    for samples in steps(20, 9, batch_size=3, gradient_accumulate_steps=2, sampler=sampler):
        assert samples.dtype == torch.int64
        assert samples.shape == (6,)
        assert len(set(samples.tolist())) == 6
        assert 0 <= int(samples.min()) <= int(samples.max()) < 20


@pytest.mark.parametrize("sampler", ["rand", "epoch"])
def test_fewer_samples_than_a_step_wants_are_all_taken(sampler):
    for samples in steps(5, 4, batch_size=8, sampler=sampler):
        assert sorted(samples.tolist()) == [0, 1, 2, 3, 4]


def test_an_epoch_takes_every_sample_once_before_any_comes_again():
    found = steps(12, 6, batch_size=4, sampler="epoch")
    assert sorted(torch.cat(found[:3]).tolist()) == list(range(12))
    assert sorted(torch.cat(found[3:]).tolist()) == list(range(12))
    assert torch.cat(found[:3]).tolist() != torch.cat(found[3:]).tolist()


def test_the_rest_of_an_epoch_that_fills_no_step_is_left_out():
    found = steps(10, 4, batch_size=4, sampler="epoch")
    assert all(samples.numel() == 4 for samples in found)
    assert len(set(torch.cat(found[:2]).tolist())) == 8


def test_random_steps_are_drawn_anew():
    found = steps(16, 2, batch_size=8)
    assert set(found[0].tolist()) & set(found[1].tolist())


@pytest.mark.parametrize("sampler", ["rand", "epoch"])
def test_the_generator_decides_alone(sampler):
    first, again, other = (torch.stack(steps(16, 4, seed=s, batch_size=4, sampler=sampler)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_size_and_accumulation_share_one_order():
    """4 x 1 and 2 x 2 see the same samples in the same order."""
    one = torch.stack(steps(16, 5, batch_size=4))
    assert torch.equal(one, torch.stack(steps(16, 5, batch_size=2, gradient_accumulate_steps=2)))
