"""The allocation against all combinations, on random instances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from auto_round.errors import ConfigError
from auto_round.mixed_bits import allocation
from auto_round.mixed_bits.allocation import allocate


def instance(seed, groups=6, options=3):
    generator = np.random.default_rng(seed)
    costs = generator.integers(1, 40, (groups, options)).tolist()
    losses = generator.random((groups, options)).tolist()
    cheapest, dearest = (sum(f(own) for own in costs) for f in (min, max))
    return costs, losses, int(generator.integers(cheapest, dearest + 1))


def of(values, chosen):
    return sum(own[index] for own, index in zip(values, chosen, strict=True))


def least(costs, losses, budget):
    """Returns the least loss within the budget, by looking at every combination."""
    every = itertools.product(*(range(len(own)) for own in costs))
    return min(of(losses, chosen) for chosen in every if of(costs, chosen) <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_within_the_budget_is_better(seed):
    costs, losses, budget = instance(seed)
    chosen = allocate(costs, losses, budget)
    assert of(costs, chosen) <= budget
    assert of(losses, chosen) == pytest.approx(least(costs, losses, budget), rel=1e-12)


def test_groups_may_have_different_numbers_of_options():
    assert allocate([[5], [1, 9], [2, 3, 4]], [[1.0], [9.0, 0.0], [3.0, 2.0, 1.0]], 5 + 9 + 3) == [0, 1, 1]


def test_a_budget_of_the_cheapest_options_leaves_no_choice():
    assert allocate([[4, 2], [7, 3]], [[0.0, 1.0], [0.0, 1.0]], 5) == [1, 1]
    with pytest.raises(ConfigError, match="cheapest options together take 5, more than the budget of 4"):
        allocate([[4, 2], [7, 3]], [[0.0, 1.0], [0.0, 1.0]], 4)


def test_an_option_that_is_dearer_and_worse_is_not_taken():
    assert allocate([[1, 2]], [[0.1, 0.2]], 100) == [0]


@pytest.mark.parametrize("seed", range(10))
def test_with_few_states_the_budget_holds_and_the_loss_is_near_the_least(seed, monkeypatch):
    monkeypatch.setattr(allocation, "MOST_STATES", 40)
    costs, losses, budget = instance(seed, groups=8)
    chosen = allocate(costs, losses, budget)
    assert of(costs, chosen) <= budget
    assert of(losses, chosen) <= least(costs, losses, budget) + 0.5
