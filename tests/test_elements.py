"""Elements against torch's float8 types, tables written out by hand, and the rules of the OCP documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    ELEMENTS,
    MXINT4,
    MXINT8,
    FloatElement,
    floor_log2,
    largest_level,
    power_of_two,
)

FLOATS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}
FIXED = {"mxint4": MXINT4, "mxint8": MXINT8}
EVERY = FLOATS | FIXED
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# Positive numbers in the order of their codes, from the tables of the OCP Microscaling specification v1.0, section 5.3.
TABLES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [
        0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
    ],
    "e3m2": [
        0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28,
    ],
}  # fmt: skip


def numbers(element) -> torch.Tensor:
    """Returns the finite numbers of an element, each once."""
    decoded = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    return decoded[decoded.isfinite() & (decoded.abs() <= element.largest)].unique()


@pytest.mark.parametrize("name", TABLES)
def test_codes_mean_the_numbers_of_the_specification(name):
    element, table = FLOATS[name], torch.tensor(TABLES[name], dtype=torch.float32)
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    assert torch.equal(element.decode(codes), torch.cat([table, -table]))
    assert element.largest == TABLES[name][-1]
    assert 2.0**element.max_exponent <= element.largest < 2.0 ** (element.max_exponent + 1)


@pytest.mark.parametrize("name", TORCH)
def test_eight_bit_codes_are_those_of_torch(name):
    codes = torch.arange(256).to(torch.uint8)
    theirs, ours = codes.view(TORCH[name]).float(), FLOATS[name].decode(codes)
    finite = theirs.isfinite()
    assert torch.equal(ours[finite], theirs[finite])
    assert torch.equal(ours[finite].signbit(), theirs[finite].signbit())
    assert ours[~finite].isnan().all()
    assert torch.equal(FLOATS[name].encode(theirs[finite]), codes[finite])
    assert FLOATS[name].largest == torch.finfo(TORCH[name]).max


@pytest.mark.parametrize("name", TORCH)
def test_eight_bit_rounding_is_torchs_cast_but_saturates(name):
    element, dtype = FLOATS[name], TORCH[name]
    grid = numbers(element)
    x = torch.cat([
        torch.randn(5000, generator=torch.Generator().manual_seed(0)) * element.largest / 3,
        torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 2.0**-8,
        (grid[1:] + grid[:-1]) / 2,  # every tie
        torch.tensor([0.0, -0.0, 1e9, -1e9]),
    ])  # fmt: skip
    expected = x.clamp(-element.largest, element.largest).to(dtype)
    assert torch.equal(element.round(x), expected.float())
    assert torch.equal(element.encode(element.round(x)), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.25, 0.0), (0.2501, 0.5), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),
        (5.001, 6.0), (6.0, 6.0), (7.0, 6.0), (1e30, 6.0), (-0.25, -0.0), (-0.75, -1.0), (-100.0, -6.0),
    ],
)  # fmt: skip
def test_fp4_ties_go_to_even_and_large_numbers_saturate(value, rounded):
    assert E2M1.round(torch.tensor(value)) == rounded


@pytest.mark.parametrize(
    ("element", "value", "rounded"),
    [
        (E2M3, 0.0625, 0.0), (E2M3, 0.1875, 0.25), (E2M3, 0.9375, 1.0), (E2M3, 3.875, 4.0), (E2M3, 7.9, 7.5),
        (E3M2, 0.03125, 0.0), (E3M2, 0.09375, 0.125), (E3M2, 0.46875, 0.5), (E3M2, 22.0, 24.0), (E3M2, 31.0, 28.0),
    ],
)  # fmt: skip
def test_fp6_by_hand(element, value, rounded):
    assert element.round(torch.tensor([value, -value])).tolist() == [rounded, -rounded]


@pytest.mark.parametrize("name", EVERY)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
def test_rounding_finds_the_nearest_number(name, values):
    element, x = EVERY[name], torch.tensor(values, dtype=torch.float32)
    rounded, grid = element.round(x), numbers(element)
    nearest = (x.double()[:, None] - grid.double()).abs().amin(1)
    assert torch.equal((x.double() - rounded.double()).abs(), nearest)
    assert torch.equal(element.round(rounded), rounded)


@pytest.mark.parametrize("name", EVERY)
def test_encode_and_decode_are_inverse_on_every_number(name):
    element = EVERY[name]
    grid = numbers(element)
    assert torch.equal(element.decode(element.encode(grid)), grid)
    assert int(element.encode(grid).max()) < 2**element.bits


@pytest.mark.parametrize("name", EVERY)
def test_nearest_codes_are_the_codes_of_rounded_numbers(name):
    element = EVERY[name]
    grid = numbers(element)
    ties = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9)), ties, grid])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(20000, generator=generator) * torch.exp2(torch.randint(-30, 20, (20000,), generator=generator))
    rest = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38, float("inf"), -float("inf")])
    x = torch.cat([near, drawn, rest])
    x = x[x.isfinite()] if name in FIXED else x
    assert torch.equal(element.nearest_codes(x), element.encode(element.round(x)))


@pytest.mark.parametrize("name", FLOATS)
def test_zero_keeps_its_sign(name):
    element = FLOATS[name]
    codes = element.encode(element.round(torch.tensor([0.0, -0.0])))
    assert codes.tolist() == [0, 2 ** (element.bits - 1)]
    assert element.decode(codes).signbit().tolist() == [False, True]


@pytest.mark.parametrize("name", FLOATS)
def test_the_spacing_is_the_distance_to_the_next_number(name):
    element = FLOATS[name]
    grid = numbers(element)
    grid = grid[grid >= 0]
    middle = (grid[1:] + grid[:-1]) / 2
    assert torch.equal(element.spacing(middle), grid[1:] - grid[:-1])
    assert torch.equal(element.spacing(-middle), grid[1:] - grid[:-1])


def test_fixed_point_by_hand():
    # MXINT8: units of 1/64, from -127/64 to 127/64.
    x = torch.tensor([1.0, -1.0, 1 / 128, 3 / 128, 5.0, -5.0])
    assert MXINT8.round(x).tolist() == [1.0, -1.0, 0.0, 2 / 64, 127 / 64, -127 / 64]
    assert MXINT8.encode(MXINT8.round(x)).tolist() == [64, 192, 0, 2, 127, 129]
    # MXINT4: units of 1/4, from -7/4 to 7/4.
    assert MXINT4.round(torch.tensor([0.375, 1.9, -1.9])).tolist() == [0.5, 1.75, -1.75]
    assert MXINT4.encode(torch.tensor([0.5, 1.75, -1.75])).tolist() == [2, 7, 9]


def test_powers_of_two_are_exact_over_the_range_of_float32():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]
    assert torch.equal(floor_log2(power_of_two(exponents)), exponents)
    below = torch.nextafter(power_of_two(exponents[1:]), torch.tensor(0.0))
    assert torch.equal(floor_log2(below), exponents[:-1])
    assert floor_log2(torch.tensor([0.0, 1e-40])).tolist() == [-127, -127]


@pytest.mark.parametrize(
    ("data_type", "bits", "largest"),
    [("int", 8, 127), ("int", 4, 7), ("fp", 8, 448), ("fp_e5m2", 8, 57344), ("mx_fp", 4, 6), ("mx_int", 8, 127 / 64)],
)
def test_the_largest_level_of_a_type(data_type, bits, largest):
    assert largest_level(data_type, bits) == largest


def test_float_codes_have_the_width_of_their_name():
    assert all(element.bits == bits for (_, bits), element in ELEMENTS.items())
    assert all(isinstance(element, FloatElement) for element in FLOATS.values())


@pytest.mark.parametrize("name", EVERY)
def test_distances_follow_from_exponents_and_fraction_bits(name):
    """What kernels make numbers of an element from."""
    element, x = EVERY[name], torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1000
    x = torch.cat([x, x * 1e-4, x * 1e-8, torch.zeros(1)])
    exponent = floor_log2(x.abs()).clamp(element.min_exponent, element.max_exponent)
    assert torch.equal(element.spacing(x), power_of_two(exponent - element.fraction_bits))
    unit = torch.ones_like(x) if element.offsets_count_scales else element.spacing(x)
    assert torch.equal(element.offset_unit(x), unit)
