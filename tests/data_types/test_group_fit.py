"""Fits of single groups, against least squares solved by torch.linalg and exhaustive searches."""

from __future__ import annotations

import math

import torch

from auto_round.data_types.group_fit import ErrorWeights, error_weights, fit_affine, fit_signed, levels_for


def random_groups(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, size, generator=generator), torch.rand(1, 3, size, generator=generator) + 0.1


def error_of(x, squares, scale, minimum, bounds):
    levels = levels_for(x, scale, minimum, bounds)
    fake = scale * levels if minimum is None else scale * levels - minimum
    return (squares * (fake - x).square()).sum(-1, keepdim=True)


def test_a_grid_is_found_exactly():
    levels = torch.tensor([0.0, 3, 1, 2, 2, 0, 3, 1]).expand(2, 1, 8)
    x = 0.5 * levels - 0.75
    scale, minimum = fit_affine(x, ErrorWeights(torch.ones(1, 1, 8)), 2, minimum_floor=0.0)
    assert torch.allclose(scale, torch.tensor(0.5), rtol=1e-5)
    assert torch.allclose(minimum, torch.tensor(0.75), rtol=1e-5)


def test_the_fit_is_as_good_as_a_fine_search():
    x, squares = random_groups()
    scale, minimum = fit_affine(x, ErrorWeights(squares), 2, minimum_floor=-math.inf)
    found = error_of(x, squares, scale, minimum, (0, 3))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best = torch.full_like(found, math.inf)
    for below in torch.linspace(-0.1, 0.45, 45):
        for above in torch.linspace(-0.1, 0.45, 45):
            span = (high - low) * (1 - below - above)
            best = torch.minimum(best, error_of(x, squares, span / 3, -(low + below * (high - low)), (0, 3)))
    # The fine search takes the scale as it is, without regression, so it may also be the worse one.
    assert float(found.sum()) <= float(best.sum()) * 1.02


def test_minima_without_a_sign_are_not_below_zero():
    x, squares = random_groups()
    scale, minimum = fit_affine(x.abs() + 1, ErrorWeights(squares), 4, minimum_floor=0.0)
    assert (minimum >= 0).all()
    assert (scale > 0).all()


def test_a_signed_scale_is_as_good_as_a_fine_search():
    x, squares = random_groups()
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = fit_signed(x, ErrorWeights(squares), 3, extreme / -4)
    found = error_of(x, squares, scale, None, (-4, 3))
    best = torch.full_like(found, math.inf)
    for ratio in torch.linspace(0.3, 1.5, 400):
        for sign in (1, -1):
            best = torch.minimum(best, error_of(x, squares, extreme / -4 * ratio * sign, None, (-4, 3)))
    assert float(found.sum()) <= float(best.sum()) * 1.01


def test_products_of_channels_are_summed_in_errors():
    residual = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    products = torch.tensor([[[2.0, 1.0], [1.0, 3.0]], [[1.0, 0.5], [0.5, 1.0]]])
    weights = ErrorWeights(torch.diagonal(products, dim1=1, dim2=2)[None], products)
    assert weights.error(residual).flatten().tolist() == [2 + 4 + 12, 9 - 3 + 1]
    assert weights.diagonal().error(residual).flatten().tolist() == [2 + 12, 9 + 1]


def test_importance_has_mean_one_and_no_zeros():
    weight = torch.zeros(2, 4)
    squares = error_weights(torch.tensor([0.0, 2.0, 4.0, 2.0]), weight, 2).squares
    assert squares.shape == (1, 2, 2)
    assert torch.allclose(squares.flatten(), torch.tensor([0.0, 1.0, 2.0, 1.0]), atol=2e-6)
    assert (squares > 0).all()
    products = error_weights(torch.eye(2).expand(2, 2, 2) * 5, weight, 2)
    assert products.products is not None
    assert torch.allclose(products.products[1], torch.eye(2), atol=2e-6)
