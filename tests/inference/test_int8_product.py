import dataclasses

import pytest
import torch
from torch import Tensor

from auto_round.inference import int8_product
from auto_round.inference.int8_product import LARGEST, int8_linear, quantize_activations, tile_widths
from auto_round.inference.processor import has_int8_dot_product

needs_exact_sums = pytest.mark.skipif(not has_int8_dot_product(), reason="sums of 8-bit products may saturate")


@dataclasses.dataclass
class PlainTile:
    features: slice
    codes_GKT: Tensor

    def matrices(self, count):
        yield from self.codes_GKT.split(count)


def make(tokens=5, features=80, groups=3, size=32, widths=(64, 16), spread=1.0):
    rng = torch.Generator().manual_seed(tokens)
    codes = torch.randint(-128, 128, (groups, size, features), generator=rng, dtype=torch.int8)
    scale = torch.rand(groups, features, generator=rng) * 0.1
    x = torch.randn(tokens, groups * size, generator=rng)
    x[:, ::7] *= spread
    tiles, start = [], 0
    for width in widths:
        some = slice(start, start + width)
        tiles.append(PlainTile(some, codes[:, :, some].contiguous()))
        start += width
    return x, codes, scale, tiles


def expected_product(x, codes, scale, zero=None):
    """The same sums in float64, activations rounded as documented."""
    codes_GMK, step_GM1 = quantize_activations(x, codes.shape[1])
    signed = codes.double() - (0 if zero is None else zero.double()[:, None])
    return ((codes_GMK.double() * step_GM1) @ (signed * scale.double()[:, None])).sum(0)


def test_activations_are_multiples_of_the_largest_of_their_group():
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0, 0.0, 0.0, 254.0, 3.0]])
    codes, step = quantize_activations(x, 4)
    assert codes.tolist() == [[[64, -127, 32, 0]], [[0, 0, 127, 2]]]
    assert torch.equal(step, torch.tensor([[[2 / LARGEST]], [[2.0]]]))


def test_activations_are_rounded_by_half_a_step_at_most():
    x = torch.randn(6, 96) * torch.logspace(-20, 20, 96)
    codes, step = quantize_activations(x, 32)
    error = (codes * step - x.unflatten(1, (3, 32)).transpose(0, 1)).abs()
    assert bool((error <= 0.5001 * step).all())


@pytest.mark.parametrize("shape", [(1, 64), (3, 32)], ids=["one token", "one group"])
def test_activations_are_not_changed(shape):
    x = torch.randn(shape)
    before = x.clone()
    quantize_activations(x, 32)
    assert torch.equal(x, before)


def test_zeros_stay_zeros():
    codes, step = quantize_activations(torch.zeros(2, 64, dtype=torch.bfloat16), 32)
    assert not codes.any()
    assert bool(torch.isfinite(step).all())


@needs_exact_sums
@pytest.mark.parametrize("tokens", [1, 5, 70, 200], ids="{} tokens".format)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_the_product_is_exact_but_for_the_rounding_of_activations(tokens, asymmetric):
    x, codes, scale, tiles = make(tokens)
    zero = torch.randint(-128, 128, scale.shape) if asymmetric else None
    y = int8_linear(x, tiles, scale, None if zero is None else zero * scale)
    expected = expected_product(x, codes, scale, zero)
    # Sums of three groups in float32, and of their zero points: a few roundings of the largest summand.
    bound = 1e-5 * float((x.abs() @ (codes.float() * scale[:, None]).flatten(0, 1).abs()).max())
    assert float((y - expected).abs().max()) < bound


@needs_exact_sums
def test_many_tokens_are_taken_in_blocks_that_change_nothing(monkeypatch):
    x, _, scale, tiles = make(tokens=50)
    whole = int8_linear(x, tiles, scale)
    monkeypatch.setattr(int8_product, "MOST_TOKENS", 20)
    assert torch.equal(int8_linear(x, tiles, scale), whole)


@needs_exact_sums
@pytest.mark.parametrize("groups", [1, 5, 9])
def test_any_number_of_groups_is_summed(groups):
    x, codes, scale, tiles = make(groups=groups)
    expected = expected_product(x, codes, scale)
    torch.testing.assert_close(int8_linear(x, tiles, scale).double(), expected, rtol=1e-5, atol=1e-3)


@needs_exact_sums
@pytest.mark.parametrize(("spread", "bound"), [(1.0, 0.008), (100.0, 0.012)], ids=["normal", "outliers"])
def test_the_error_of_rounded_activations_is_small(spread, bound):
    """Outliers of a hundred times the others, as of attention sinks, in one of seven features."""
    x, codes, scale, tiles = make(tokens=64, spread=spread)
    exact = x @ (codes.float() * scale[:, None]).flatten(0, 1)
    y = int8_linear(x, tiles, scale)
    assert float((y - exact).norm() / exact.norm()) < bound


@needs_exact_sums
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_result_has_the_dtype_of_the_activations(dtype):
    x, _, scale, tiles = make()
    assert int8_linear(x.to(dtype), tiles, scale).dtype == dtype


@pytest.mark.parametrize(
    ("features", "most", "widths"),
    [
        (4096, 2816, (2048, 2048)),
        (11008, 2816, (2752, 2752, 2752, 2752)),
        (16, 2816, (16,)),
        (1040, 1000, (576, 464)),
        (144, 64, (64, 64, 16)),
    ],
)
def test_tiles_are_nearly_equal_and_hold_every_feature(features, most, widths):
    assert tile_widths(features, most) == widths
    assert sum(widths) == features
