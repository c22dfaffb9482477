import math

import pytest

from auto_round.quality.figures import change, count, number, share, short_count, size


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (31.04, 3, "31.0"),
        (0.012345, 3, "0.0123"),
        (0.99996, 3, "1.00"),
        (123456.0, 3, "123,000"),
        (1.2345e-5, 3, "1.23e\N{MINUS SIGN}5"),
        (2.5e12, 2, "2.5e12"),
        (-0.5, 2, "\N{MINUS SIGN}0.50"),
        (0.0, 3, "0"),
        (0.02, 1, "0.02"),
        (math.inf, 3, "inf"),
        (None, 3, "\N{EN DASH}"),
    ],
)
def test_a_number_has_so_many_significant_digits(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (5_151_232, "5.15 MB"), (34_000, "34.0 kB"), (16.4e9, "16.4 GB")]
)
def test_a_size_is_in_decimal_units(value, text):
    assert size(value).replace("\N{NO-BREAK SPACE}", " ") == text


def test_counts_are_grouped_or_short():
    assert count(32752) == "32,752"
    assert [short_count(n).replace("\N{NO-BREAK SPACE}", " ") for n in (12, 5_771_264, 8.19e9)] == [
        "12",
        "5.77 M",
        "8.19 B",
    ]


def test_a_share_is_in_per_cent():
    assert share(0.7877).replace("\N{NO-BREAK SPACE}", " ") == "78.8 %"
    assert share(None) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2.0, 1.0, "\N{MINUS SIGN}50.0 %"),
        (1.0, 1.063, "+6.3 %"),
        (1.0, 25.0, "+2,400 %"),
        (1.0, 1.0, "0.0 %"),
        (1.0, 0.99996, "0.0 %"),
        (0.0, 1.0, "\N{EN DASH}"),
        (None, 1.0, "\N{EN DASH}"),
    ],
)
def test_a_change_has_its_sign(before, after, text):
    assert change(before, after).replace("\N{NO-BREAK SPACE}", " ") == text
