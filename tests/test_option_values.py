"""Sizes, lists of formats and layer_config as people write them."""

from __future__ import annotations

import json

import pytest

from auto_round.errors import ConfigError
from auto_round.option_values import parse_formats, parse_layer_config, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("300MB", 300 * 10**6),
        ("1.5 GB", 1_500_000_000),
        ("2KiB", 2048),
        ("1mib", 2**20),
        ("1GiB", 2**30),
        ("10kb", 10_000),
        ("1000", 1000),
        (" 7 ", 7),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TBB", "five", "0", "-1GB", "0.1", "nan", "infGB"])
def test_a_bad_size_is_refused(text):
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("auto_round", ("auto_round",)),
        ("auto_gptq, auto_awq ,AUTO_ROUND", ("auto_gptq", "auto_awq", "auto_round")),
        ("fake,fake,,fake", ("fake",)),
        (["auto_round", "fake"], ("auto_round", "fake")),
    ],
    ids=str,
)
def test_formats_keep_their_order_without_repeats(text, formats):
    assert parse_formats(text) == formats


@pytest.mark.parametrize("text", ["", " , ", []], ids=repr)
def test_no_format_is_an_error(text):
    with pytest.raises(ConfigError, match="no export format"):
        parse_formats(text)


LAYER_CONFIG = {"lm_head": {"bits": 8}, "q_proj": "W2A16"}


def test_a_layer_config_is_read_from_a_mapping_json_or_a_file(tmp_path):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(LAYER_CONFIG))
    assert parse_layer_config(LAYER_CONFIG) == LAYER_CONFIG
    assert parse_layer_config("  " + json.dumps(LAYER_CONFIG)) == LAYER_CONFIG
    assert parse_layer_config(str(file)) == LAYER_CONFIG


def test_a_layer_config_keeps_the_order_of_its_rules():
    assert list(parse_layer_config('{"z": 4, "a": 8, "m": 2}')) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{'lm_head': 8}", "not valid JSON", id="single quotes"),
        pytest.param("[1]", "neither a JSON object nor a file", id="list"),
        pytest.param("no_such_file.json", "neither a JSON object nor a file", id="missing file"),
    ],
)
def test_a_bad_layer_config_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layer_config(text)


def test_a_file_without_an_object_is_refused(tmp_path):
    file = tmp_path / "layers.json"
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        parse_layer_config(str(file))
