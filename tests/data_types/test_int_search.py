"""The search for scales against min-max ranges and against brute force over a dense grid."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types import DATA_TYPES, base, int_search
from auto_round.data_types.int import MIN_ZERO_POINT
from auto_round.schemes import QuantizationScheme

INT = DATA_TYPES["int"]
WEIGHTS = {
    "normal": lambda generator: torch.randn(16, 64, generator=generator),
    "heavy tails": lambda generator: torch.randn(16, 64, generator=generator) ** 3,
    "one sided": lambda generator: torch.rand(16, 64, generator=generator) + 0.2,
    "tiny": lambda generator: torch.randn(16, 64, generator=generator) * 1e-3,
    # Steps near the floors of scales: 2**-17 in float16, 2**-27 else.
    "small": lambda generator: torch.randn(16, 64, generator=generator) * 3e-4,
    "minute": lambda generator: torch.randn(16, 64, generator=generator) * 1e-7,
    "one outlier": lambda generator: torch.cat(
        [torch.randn(16, 63, generator=generator), torch.full((16, 1), 20.0)], dim=1
    ),
}
SCHEMES = [
    pytest.param(QuantizationScheme(bits=bits, group_size=32, sym=sym, scale_dtype=dtype), id=f"{bits} {sym} {dtype}")
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
    for dtype in ("fp16", "fp32")
]


def weighted_error(weight, importance_I, scheme, range_) -> torch.Tensor:
    """Returns (O, G) weighted squared errors of a range."""
    encoded = INT.encode(weight, scheme, range_, INT.trainable(weight, scheme))
    squares = importance_I * (encoded.dequantize().double() - weight.double()).square()
    return squares.unflatten(1, (-1, scheme.group_size)).sum(-1)


def importance_of(width: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) ** 2 + 1e-3


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_search_is_never_worse_than_min_max_in_any_group(scheme, kind):
    weight = WEIGHTS[kind](torch.Generator().manual_seed(0))
    for importance in (None, importance_of(64)):
        found = INT.search_range(weight, scheme, importance)
        weights = torch.ones(64) if importance is None else importance
        searched = weighted_error(weight, weights, scheme, found)
        plain = weighted_error(weight, weights, scheme, INT.minmax_range(weight, scheme))
        # Sums of 32 squares in float32 order errors to 32 * 2**-24 at most; groups are compared in float64 here.
        assert (searched <= plain * (1 + 1e-5)).all(), (searched / plain).max()


def brute_force(weight: torch.Tensor, importance: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """Returns (O,) least weighted errors over 4000 scales of both signs and every zero point; one group per row."""
    top = 2**scheme.bits - 1
    extreme = weight.abs().amax(-1, keepdim=True).double()
    zeros = [2 ** (scheme.bits - 1)] if scheme.sym else range(MIN_ZERO_POINT, top + 1)
    steps = torch.linspace(0.002, 1.2, 2000, dtype=torch.float64) / 2 ** (scheme.bits - 1) * 2
    if scheme.sym:
        steps = torch.cat([steps, -steps])
    scale_O1S = extreme[..., None] * steps
    best = torch.full((weight.shape[0],), torch.inf, dtype=torch.float64)
    x = weight.double()[..., None]
    for zero in zeros:
        levels = ((x / scale_O1S).round() + zero).clamp(0, top) - zero
        error = (importance.double()[:, None] * (scale_O1S * levels - x).square()).sum(1)
        best = torch.minimum(best, error.amin(-1))
    return best


# Zero points start at 1, so a group without negative weights has top - 1 levels for them and wants a scale up to
# top / (top - 1) times the min-max one: 1.5 at 2 bits. The ratios end at 1.1.


@pytest.mark.parametrize(
    ("sym", "kind"),
    [
        pytest.param(True, "normal", id="sym normal"),
        pytest.param(False, "normal", id="asym normal"),
        pytest.param(True, "heavy tails", id="sym heavy tails"),
        pytest.param(False, "heavy tails", id="asym heavy tails"),
        pytest.param(True, "one sided", id="sym one sided"),
        pytest.param(False, "one sided", id="asym one sided"),
    ],
)
@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_is_within_two_percent_of_brute_force(bits, sym, kind):
    weight = WEIGHTS[kind](torch.Generator().manual_seed(1))[:, :16]
    importance = importance_of(16)
    scheme = QuantizationScheme(bits=bits, group_size=16, sym=sym, scale_dtype="fp32")
    found = weighted_error(weight, importance, scheme, INT.search_range(weight, scheme, importance)).squeeze(1)
    best = brute_force(weight, importance, scheme)
    assert found.sum() <= 1.02 * best.sum(), float(found.sum() / best.sum())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_storable(bits, kind):
    weight = WEIGHTS[kind](torch.Generator().manual_seed(2))
    scheme = QuantizationScheme(bits=bits, group_size=32, sym=False)
    encoded = INT.encode(
        weight, scheme, INT.search_range(weight, scheme, importance_of(64)), INT.trainable(weight, scheme)
    )
    assert int(encoded.zero_point.min()) >= MIN_ZERO_POINT
    assert int(encoded.zero_point.max()) <= 2**bits - 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_found_zero_point_and_scale_survive_being_written_as_a_range(bits, dtype):
    """The tuner gets low and high, from which scale and zero point are made again: nothing may be lost on the way."""
    scheme = QuantizationScheme(bits=bits, group_size=32, sym=False, scale_dtype=dtype)
    weight = WEIGHTS["heavy tails"](torch.Generator().manual_seed(4))
    start = INT.minmax_range(weight, scheme)
    grouped, ones = weight.unflatten(1, (-1, 32)), torch.ones(1, 2, 32)
    scale, zero = int_search.search_asymmetric(grouped, ones, scheme, start["low"], start["high"], MIN_ZERO_POINT)
    range_ = INT.search_range(weight, scheme, None)
    encoded = INT.encode(weight, scheme, range_, INT.trainable(weight, scheme))
    assert torch.equal(encoded.zero_point.float(), zero.squeeze(-1))
    # fp16 and bf16: exactly; fp32: within a rounding of the subtraction and the division.
    tolerance = 2.0**-22 if dtype == "fp32" else 0.0
    assert torch.allclose(encoded.scale, scale.squeeze(-1), rtol=tolerance, atol=0)


def test_both_signs_of_a_symmetric_scale_are_tried():
    # 2 bits, levels -2..1 times the scale. Scale 1 fits (-2, 1, 1, 1) exactly; (2, -1, -1, -1) needs scale -1.
    scheme = QuantizationScheme(bits=2, group_size=4, scale_dtype="fp32")
    weight = torch.tensor([[-2.0, 1, 1, 1], [2, -1, -1, -1]])
    assert INT.search_range(weight, scheme, None)["scale"].flatten().tolist() == pytest.approx([1.0, -1.0])
    # Here the extreme is negative (-1.1), yet three weights at +2 steps of the other sign are worth more.
    weight = torch.tensor([[-1.1, 1.0, 1.0, 1.0, 1.0, 0.5, -0.5, 0.0]])
    scheme = QuantizationScheme(bits=2, group_size=8, scale_dtype="fp32")
    assert INT.minmax_range(weight, scheme)["scale"].item() > 0
    assert INT.search_range(weight, scheme, None)["scale"].item() < 0


@pytest.mark.parametrize(
    "outlier",
    [
        # The scale that fits the others is 1; the min-max one is 2.5 and 18.5, and the ratios begin at 0.3.
        pytest.param(5.0, id="within the ratios"),
        pytest.param(
            37.0,
            id="beyond the ratios",
            marks=pytest.mark.xfail(strict=True, reason="no candidate below 0.3 times the min-max scale"),
        ),
    ],
)
def test_channels_without_importance_do_not_count(outlier):
    scheme = QuantizationScheme(bits=2, group_size=4, scale_dtype="fp32")
    weight = torch.tensor([[-2.0, 1.0, 0.0, outlier]])
    range_ = INT.search_range(weight, scheme, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    encoded = INT.encode(weight, scheme, range_, INT.trainable(weight, scheme))
    assert encoded.dequantize()[0, :3].tolist() == pytest.approx([-2.0, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_all_importances_zero_still_gives_finite_ranges(sym):
    scheme = QuantizationScheme(bits=2, group_size=32, sym=sym)
    weight = WEIGHTS["normal"](torch.Generator().manual_seed(0))
    range_ = INT.search_range(weight, scheme, torch.zeros(64))
    assert INT.encode(weight, scheme, range_, INT.trainable(weight, scheme)).dequantize().isfinite().all()


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_pieces_of_rows_give_the_same_result(sym, monkeypatch):
    scheme = QuantizationScheme(bits=2, group_size=32, sym=sym)
    weight = WEIGHTS["normal"](torch.Generator().manual_seed(5))
    whole = INT.search_range(weight, scheme, importance_of(64))
    monkeypatch.setitem(base.CHUNK_ELEMENTS, "cpu", 3 * 64)
    pieces = INT.search_range(weight, scheme, importance_of(64))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_one_scale_per_tensor_is_not_searched():
    scheme = QuantizationScheme(bits=2, group_size=0)
    weight = WEIGHTS["normal"](torch.Generator().manual_seed(6))
    found, plain = INT.search_range(weight, scheme, importance_of(64)), INT.minmax_range(weight, scheme)
    assert torch.equal(found["scale"], plain["scale"])


def test_a_shorter_last_group_is_searched_without_its_padding():
    scheme = QuantizationScheme(bits=2, group_size=32, scale_dtype="fp32")
    weight = WEIGHTS["heavy tails"](torch.Generator().manual_seed(7))[:, :44]
    last = INT.search_range(weight[:, 32:].contiguous(), scheme.replace(group_size=-1), None)["scale"]
    both = INT.search_range(weight, scheme, None)["scale"]
    assert torch.allclose(both[:, 1:], last, rtol=1e-6, atol=0)
