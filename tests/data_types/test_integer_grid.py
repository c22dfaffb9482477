"""The common part of integer types, by hand on single weights; the types have their own tests."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types.integer_grid import IntegerGrid
from auto_round.schemes import QuantizationScheme

SCHEME = QuantizationScheme(bits=2, group_size=4)
WEIGHT = torch.tensor([[-1.0, 0.2, 0.9, 3.0]])


def column(value):
    return torch.full((1, 1, 1), float(value))


@pytest.mark.parametrize(
    ("grid", "levels", "values"),
    [
        (IntegerGrid(column(0.5), (-2, 1)), [-2, 0, 1, 1], [-1.0, 0.0, 0.5, 0.5]),
        (IntegerGrid(column(-0.5), (-2, 1)), [1, 0, -2, -2], [-0.5, 0.0, 1.0, 1.0]),
        (IntegerGrid(column(1), (0, 3), zero=column(1)), [0, 1, 2, 3], [-1.0, 0.0, 1.0, 2.0]),
        (IntegerGrid(column(1), (0, 3), offset=column(-0.5)), [0, 1, 1, 3], [-0.5, 0.5, 0.5, 2.5]),
        (IntegerGrid(column(0), (0, 3), offset=column(-0.5)), [0, 1, 1, 3], [-0.5] * 4),
    ],
    ids=["signed", "negative scale", "zero point", "offset", "scale of zero"],
)
def test_levels_and_values_of_weights(grid, levels, values):
    rounding = {"rounding": torch.zeros(1, 1, 4)}
    codes = grid.codes(grid.latent(WEIGHT, SCHEME, rounding).round()).clamp(*grid.bounds)
    assert codes.flatten().tolist() == levels
    assert grid.values(codes).flatten().tolist() == values


def test_an_offset_of_rounding_moves_the_latent_weight_by_levels():
    rounding = {"rounding": torch.tensor([[[0.5, -0.5, 0.25, 0.0]]])}
    latent = IntegerGrid(column(0.5), (-2, 1)).latent(WEIGHT, SCHEME, rounding)
    assert latent.flatten().tolist() == pytest.approx([-1.5, -0.1, 2.05, 6.0])
