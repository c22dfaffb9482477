import re
from xml.etree import ElementTree

import pytest

from auto_round.quality.plots import Scale, Series, columns_by_block, curve, layer_map, lines_by_block, stacked_bar


def parsed(svg):
    """Returns the tree; a plot that is no XML is an error."""
    return ElementTree.fromstring(svg)


def titles(svg):
    return [element.text for element in parsed(svg).iter("title")]


def test_a_logarithmic_scale_puts_the_geometric_mean_in_the_middle():
    scale = Scale(0.01, 1.0, 100.0, 0.0)
    assert [scale.at(value) for value in (0.01, 0.1, 1.0)] == pytest.approx([100, 50, 0])
    assert scale.at(5.0) == pytest.approx(0)
    assert scale.at(1e-9) == pytest.approx(100)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 2.5, [1, 2]),
        (0.009, 0.6, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
        (1e-4, 0.2, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
    ],
)
def test_ticks_are_few_and_evenly_apart(low, high, ticks):
    assert Scale(low, high, 0, 1).ticks() == pytest.approx(ticks)


def test_lines_have_a_point_for_each_value_and_none_where_there_is_none():
    series = [Series("one", "one", [0.1, None, 0.2]), Series("two", "two", [1.0, 2.0, 0.0])]
    svg = lines_by_block("Losses", ["a", "b", "c"], series)
    assert titles(svg) == ["a: one 0.100", "c: one 0.200", "a: two 1.00", "b: two 2.00"]
    lines = [element.get("points").split() for element in parsed(svg).iter("polyline")]
    assert [len(line) for line in lines] == [2, 2]
    assert parsed(svg).get("aria-label") == "Losses"


def test_larger_values_stand_higher():
    svg = lines_by_block("x", ["a", "b"], [Series("s", "one", [0.1, 10.0])])
    low, high = (float(circle.get("cy")) for circle in parsed(svg).iter("circle"))
    assert high < low


@pytest.mark.parametrize("value", [None, 0.0])
def test_nothing_is_drawn_of_nothing(value):
    assert lines_by_block("x", ["a"], [Series("s", "one", [value])]) == ""
    assert lines_by_block("x", [], [Series("s", "one", [])]) == ""
    assert layer_map("x", ["q"], ["a"], {} if value is None else {("q", 0): value}, str) == ""
    assert columns_by_block("x", ["a"], [{}], {}, str) == ""


def test_all_blocks_of_a_deep_model_fit():
    names = [f"layers.{number}" for number in range(126)]
    svg = lines_by_block("x", names, [Series("s", "one", [1.0] * 126)])
    width = float(parsed(svg).get("viewBox").split()[2])
    assert all(0 <= float(circle.get("cx")) <= width for circle in parsed(svg).iter("circle"))
    numbers = [text.text for text in parsed(svg).iter("text") if re.fullmatch(r"\d+", text.text)]
    assert {"0", "100", "120"} <= set(numbers)
    assert len(numbers) <= 18


def test_a_curve_of_no_loss_is_flat():
    points = next(parsed(curve("x", [0.0, 0.0])).iter("polyline")).get("points").split()
    assert len({point.split(",")[1] for point in points}) == 1
    assert len(list(parsed(curve("x", [3.0])).iter("polyline"))) == 1


def test_a_map_shades_values_by_their_logarithm():
    svg = layer_map("x", ["q", "k"], ["b0", "b1"], {("q", 0): 0.01, ("k", 1): 1.0, ("q", 1): 0.1}, str)
    shades = {title: float(rect.get("fill-opacity")) for title, rect in zip(titles(svg), cells(svg), strict=True)}
    assert shades["b0.q: 0.01"] < shades["b1.q: 0.1"] < shades["b1.k: 1.0"]
    assert shades["b1.q: 0.1"] == pytest.approx((shades["b0.q: 0.01"] + shades["b1.k: 1.0"]) / 2, abs=0.011)


def cells(svg):
    return list(parsed(svg).iter("rect"))


def test_columns_are_as_high_as_their_parts():
    parts = [{"int4": 30.0, "int8": 10.0}, {"int4": 20.0}]
    svg = columns_by_block("x", ["a", "b"], parts, {"int4": "t0", "int8": "t1"}, str)
    heights = [float(rect.get("height")) for rect in cells(svg)]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.2)
    assert heights[2] == pytest.approx(2 * heights[1], abs=0.2)


def test_a_bar_is_as_long_as_its_part_of_the_whole():
    svg = stacked_bar("x", {"int4": 25.0, "16-bit": 25.0}, {"int4": "t0", "16-bit": "kept"}, 100.0, str)
    first, second = cells(svg)
    assert float(second.get("x")) == pytest.approx(680 / 4)
    assert float(second.get("x")) + float(second.get("width")) == pytest.approx(680 / 2, abs=1.1)
    assert (first.get("class"), second.get("class")) == ("t0", "kept")


def test_names_are_escaped():
    name = '<script>"&'
    svg = [
        lines_by_block(name, [name], [Series(name, "one", [1.0])]),
        layer_map(name, [name], [name], {(name, 0): 1.0}, lambda _value: name),
        columns_by_block(name, [name], [{name: 1.0}], {name: "t0"}, lambda _value: "1"),
        stacked_bar(name, {name: 1.0}, {name: "t0"}, 1.0, lambda _value: name),
        curve(name, [1.0]),
    ]
    assert all(parsed(one).get("aria-label") == name for one in svg)
    assert all("<script" not in one for one in svg)
