import re
from html.parser import HTMLParser

import pytest
from quality.record_example import example, without_text

from auto_round.quality.page import page

VOID = {"meta", "wbr", "br"}


class Reader(HTMLParser):
    """Checks that every element is closed in its place; keeps names of elements, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


@pytest.mark.parametrize("record", [example(), without_text()], ids=["tuned", "rounded"])
def test_a_page_is_whole_and_needs_nothing_else(record):
    text = page(record)
    found = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert {"html", "head", "body", "main", "h1", "table"} <= set(found.elements)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.elements)
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?:|//|url\(|@import", text.replace("<!DOCTYPE html>", ""))
    assert ("lang", "en") in found.attributes
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("record", [example(), without_text()], ids=["tuned", "rounded"])
def test_every_block_and_layer_is_on_the_page(record):
    found = Reader(page(record))
    cells = set(found.text)
    assert {block["name"] for block in record["blocks"]} <= cells
    assert {layer["name"] for layer in record["layers"]} <= cells


def test_the_figures_are_told():
    words = Reader(page(example())).words
    for told in ("9.710 → 9.948", "+2.5 %", "0.0231", "± 0.0011", "93.1 %", "8,176 positions", "43.5 kB", "41.0 k"):
        assert told in words, told
    assert "Not measured" not in words


def test_what_is_missing_is_told_and_not_drawn():
    words = Reader(page(without_text())).words
    assert "Not measured: plain rounding reads no calibration text." in words
    for absent in ("Perplexity, 16-bit", "Error of block outputs", "Tuning", "None", "nan"):
        assert absent not in words, absent
    assert "Error of layers" in words


def test_names_are_escaped():
    name = '<script>alert("x")</script>&'
    record = example()
    record["model"]["name"] = record["run"]["format"] = record["run"]["scheme"] = record["text"] = name
    record["missing"] = [name]
    for one in (*record["blocks"], *record["layers"]):
        one["name"] = name
    record["blocks"][0]["note"] = record["layers"][0]["why"] = record["size"]["types"][1]["type"] = name
    for block in record["blocks"]:
        block["names"] = [name]
    record["layers"][1]["block"] = record["layers"][1]["type"] = name
    text = page(record)
    found = Reader(text)
    assert "script" not in found.elements
    assert "<script" not in text
    assert name in found.words


def test_plots_say_what_they_show():
    found = Reader(page(example()))
    labels = [value for name, value in found.attributes if name == "aria-label"]
    assert found.elements.count("svg") == len([label for label in labels if label not in ("Plot", *TABLES)])
    assert "Loss of model.layers.0 over 4 steps" in labels


TABLES = ("All blocks", "All layers")
