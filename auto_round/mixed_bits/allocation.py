"""Chooses one option for each group of layers, so that the sum of losses is least and the cost stays in a budget.

This is the multiple-choice knapsack problem. Groups are added one by one; of all choices so far those are kept that no
other one beats in cost and loss, which loses nothing. Costs are whole numbers (bits), so equal costs are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from auto_round.errors import ConfigError

# States kept between groups. A model's costs have large common factors, so there are far fewer different sums; where
# there are more, costs are rounded up to a grid of so many: the budget holds, the loss may be a hair above the least.
MOST_STATES = 1 << 18


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Returns the index of the chosen option of each group.

    Args:
        costs, losses: of each option of each group; not negative costs.
        budget: largest sum of costs.
    Raises:
        ConfigError: even the cheapest options cost more.
    """
    cheapest = sum(min(own) for own in costs)
    if cheapest > budget:
        raise ConfigError(f"the cheapest options together take {cheapest}, more than the budget of {budget}")
    sums, totals = np.zeros(1, np.int64), np.zeros(1, np.float64)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    left = cheapest
    for own_costs, own_losses in zip(costs, losses, strict=True):
        left -= min(own_costs)
        sums, totals, parents, chosen = _extended(sums, totals, own_costs, own_losses, budget - left)
        steps.append((parents, chosen))
    index, found = int(np.argmin(totals)), []
    for parents, chosen in reversed(steps):
        found.append(int(chosen[index]))
        index = int(parents[index])
    return found[::-1]


def _extended(
    sums: np.ndarray, totals: np.ndarray, costs: Sequence[int], losses: Sequence[float], most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns cost, loss, previous state and option of the states that one more group makes, cheapest first.

    Args:
        most: a state may cost this much; the rest is what the groups to come need at least.
    """
    count = len(sums)
    all_sums = np.concatenate([sums + cost for cost in costs])
    all_totals = np.concatenate([totals + loss for loss in losses])
    parents = np.tile(np.arange(count, dtype=np.int32), len(costs))
    chosen = np.repeat(np.arange(len(costs), dtype=np.int8), count)
    order = np.lexsort((all_totals, all_sums))
    order = order[all_sums[order] <= most]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], all_totals[order][:-1]]))
    kept = order[all_totals[order] < best_before]
    if len(kept) > MOST_STATES:
        kept = _thinned(kept, all_sums, most)
    return all_sums[kept], all_totals[kept], parents[kept], chosen[kept]


def _thinned(kept: np.ndarray, sums: np.ndarray, most: int) -> np.ndarray:
    """Returns at most MOST_STATES of the states: of those with nearly the same cost, the dearest, which has the least
    loss; the first one is kept, so that a solution stays within reach."""
    first = int(sums[kept[0]])
    step = max(1, -(-(most - first) // (MOST_STATES - 1)))
    bucket = -(-(sums[kept] - first) // step)
    last = np.append(bucket[1:] != bucket[:-1], True)
    last[0] = True
    return kept[last]
