"""What there is to choose: groups, costs, budgets, and what is refused before any work."""

from __future__ import annotations

import math

import pytest

from auto_round import pipeline
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats import EXPORTERS
from auto_round.mixed_bits.choices import find_choices


def choices_of(session, *formats):
    return find_choices(session, [EXPORTERS[name] for name in formats or ("auto_round",)])


def names_of(choices):
    return {group.name: list(group.layers) for group in choices.groups}


def test_layers_that_engines_join_are_one_group(open_mixed):
    groups = names_of(choices_of(open_mixed()))
    stem = "model.layers.0"
    assert groups[f"{stem}.self_attn.q_proj/k_proj/v_proj"] == [f"{stem}.self_attn.{leaf}_proj" for leaf in "qkv"]
    assert groups[f"{stem}.mlp.gate_proj/up_proj"] == [f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj"]
    assert groups[f"{stem}.mlp.down_proj"] == [f"{stem}.mlp.down_proj"]
    assert len(groups) == 8


def test_joined_layers_may_be_told_apart(open_mixed):
    groups = names_of(choices_of(open_mixed("deepseek_v3", separate_joined=True)))
    assert groups["model.layers.0.mlp.gate_proj"] == ["model.layers.0.mlp.gate_proj"]
    assert len(groups["model.layers.1.mlp.experts.*"]) == 4 * 3


def test_the_experts_of_a_block_are_one_group_and_the_shared_one_is_not(open_mixed):
    choices = choices_of(open_mixed("deepseek_v3"))
    groups = names_of(choices)
    assert len(groups["model.layers.1.mlp.experts.*"]) == 4 * 3
    assert "model.layers.1.mlp.shared_experts.gate_proj/up_proj" in groups
    assert [group.pattern for group in choices.groups if group.pattern] == ["model.layers.1.mlp.experts.*"]


def test_costs_are_bits_with_scales_and_the_budget_is_what_is_left(open_mixed):
    session = open_mixed()
    choices = choices_of(session)
    group = choices.groups[0]
    assert group.weights == 64 * 64 + 2 * 32 * 64
    # A scale of 16 bits and a zero point of the code's width for 32 weights.
    assert [group.costs[index] / group.weights for index in range(3)] == [2 + 18 / 32, 4 + 20 / 32, 8 + 24 / 32]
    assert choices.total == sum(math.prod(e.layer.shape) for e in session.plan.entries if e.layer.block is not None)
    assert (choices.budget, choices.fixed) == (math.floor(3.5 * choices.total), 0)


def test_scales_may_be_left_out_of_the_count(open_mixed):
    group = choices_of(open_mixed(ignore_scale_zp_bits=True)).groups[0]
    assert [group.costs[index] for index in range(3)] == [n * group.weights for n in (2, 4, 8)]


def test_layers_that_are_named_are_fixed_and_count(open_mixed):
    session = open_mixed(layer_config={"down_proj": 8}, fp_layers="layers.0.self_attn.o_proj", target_bits=7)
    choices = choices_of(session)
    assert all("down_proj" not in name for name in names_of(choices))
    assert "model.layers.0.self_attn.o_proj" not in names_of(choices)
    down = 2 * 64 * 128 * (8 + 24 / 32)
    assert choices.fixed == down + 64 * 64 * 16
    assert choices.budget == math.floor(7 * choices.total) - choices.fixed


def test_an_option_that_a_format_does_not_hold_is_none(open_mixed):
    session = open_mixed(options="W4A16G32,W5A16G32,W8A16G32", target_bits=6)
    assert {tuple(group.costs) for group in choices_of(session, "auto_gptq").groups} == {(0, 2)}
    assert {tuple(group.costs) for group in choices_of(session, "auto_round").groups} == {(0, 1, 2)}


@pytest.mark.parametrize(
    ("options", "formats", "message"),
    [
        ({"options": "W2A16G32"}, ("auto_round",), "there is nothing to choose between"),
        ({"options": "W4A16,W4A16G128"}, ("auto_round",), "there is nothing to choose between"),
        ({"options": "W2A16,W4A61"}, ("auto_round",), "unknown scheme 'W4A61'. Did you mean 'W4A16'?"),
        ({"target_bits": 2.0}, ("auto_round",), r"target_bits=2.0 \(the least is 2.563, scales counted\)"),
        ({"target_size": "10KB"}, ("auto_round",), r"target_size=10KB \(the smallest is 1MB\)"),
        ({"layer_config": {"proj": 8}}, ("auto_round",), "there is no layer left to choose for"),
    ],
)
def test_what_cannot_be_is_refused(options, formats, message, open_mixed):
    with pytest.raises(ConfigError, match=message):
        choices_of(open_mixed(**options), *formats)


@pytest.mark.parametrize(
    ("options", "format_", "message"),
    [
        ("W4A16G32,W4A16G64", "auto_awq", "cannot store layers that differ in group_size"),
        ("W2A16G32,W3A16G32", "auto_awq", r"cannot store bits=2 \(only 4\)"),
        ("W5A16G32,W6A16G32", "auto_gptq", r"cannot store bits=5 \(only 2, 3, 4, 8\)"),
    ],
)
def test_formats_that_cannot_hold_the_options_refuse_them(options, format_, message, open_mixed):
    with pytest.raises(UnsupportedError, match=message):
        choices_of(open_mixed(options=options, target_bits=5), format_)


def test_an_option_that_is_none_for_any_layer_is_told(open_mixed, caplog):
    choices_of(open_mixed(options="W2A16G32,W4A16G32,MXFP4"), "auto_gptq")
    assert "option MXFP4 is left out: auto_gptq cannot hold it" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": "W2A16,W4A16"}, "options needs a budget: give either target_bits or target_size"),
        ({"options": "W2A16,W4A16", "target_bits": 3, "target_size": "1GB"}, "options needs a budget"),
        ({"target_bits": 3}, "target_bits needs the schemes to choose among"),
        ({"options": "a,b", "target_bits": 0}, r"target_bits=0 \(above 0, at most 16\)"),
        ({"options": "a,b", "target_size": "big"}, "'big' is no size"),
        ({"options": "a,b", "target_size": "1GB", "ignore_scale_zp_bits": True}, "goes with target_bits"),
        ({"options": "a,b", "target_bits": 3, "sensitivity_samples": 0}, "sensitivity_samples=0"),
        ({"options": "a,b", "target_bits": 3, "bits": 4, "quant_lm_head": True}, "bits, quant_lm_head beside options"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_options(**options)


def test_the_plan_command_shows_what_there_is_to_choose_and_reads_no_weights(open_mixed):
    text = pipeline.describe_plan(open_mixed())
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["W2A16G32", "8", "2.562"],
        ["W4A16G32", "8", "4.625"],
        ["W8A16G32", "8", "8.750"],
    ]
