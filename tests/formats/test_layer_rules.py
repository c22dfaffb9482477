import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.config import SchemeConfig
from auto_round.formats.layer_rules import (
    dynamic_rules,
    most_common_scheme,
    patterns,
    quantized_in_blocks,
    skip_rules,
    skipped_modules,
)
from auto_round.models import discover
from auto_round.plan import resolve

FIELDS = ("bits", "group_size", "sym")
PLANS = {
    "uniform": {"bits": 4},
    "one-kind": {"bits": 4, "layer_config": {"down_proj": 8}},
    "one-block": {"bits": 4, "layer_config": {"layers.1.": {"bits": 2, "sym": False}}},
    "some-16": {"bits": 4, "fp_layers": "o_proj,layers.0.mlp"},
    "joined-16": {"bits": 4, "fp_layers": "layers.1.self_attn"},
    "half-joined": {"bits": 4, "layer_config": {"q_proj": 8, "gate_proj": 16}},
    "head": {"bits": 4, "layer_config": {"lm_head": 8}},
    "base-16": {"bits": 16, "layer_config": {"mlp": 4}},
    "groups": {"bits": 4, "layer_config": {"re:layers.0.*[qk]_proj": {"group_size": 64}, "o_proj": {"group_size": -1}}},
}


@pytest.fixture
def plan_of(make_model):
    def make(kind="llama", model=None, **options):
        return resolve(discover(make_model(kind, **(model or {}))), SchemeConfig(**{"group_size": 32, **options}))

    return make


def looked_up(rules, name):
    """What GPTQModel, vLLM and SGLang do: the first rule whose expression matches from the start of the name."""
    for rule, values in rules.items():
        if re.match(rule[2:], name):
            return "skip" if rule.startswith("-:") else values
    return {}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_rules_give_each_layer_its_scheme(options, plan_of):
    plan = plan_of(model={"num_hidden_layers": 12}, **options)
    base = most_common_scheme(plan, FIELDS)
    rules = dynamic_rules(plan, base)
    for entry in plan.entries:
        found = looked_up(rules, entry.layer.name)
        if entry.scheme.is_quantized:
            assert {field: found.get(field, getattr(base, field)) for field in FIELDS} == {
                field: getattr(entry.scheme, field) for field in FIELDS
            }
        elif entry.layer.block is not None:
            assert found == "skip"
    skipped = {e.layer.name for e in plan.entries if e.layer.block is not None and not e.scheme.is_quantized}
    only_skips = skip_rules(plan)
    assert {e.layer.name for e in plan.entries if looked_up(only_skips, e.layer.name) == "skip"} == skipped


def test_layers_that_serving_engines_join_are_known_by_their_joint_name(plan_of):
    plan = plan_of(bits=4, layer_config={"layers.0.self_attn": 8, "layers.1.mlp": 16, "layers.1.self_attn.q_proj": 8})
    rules = dynamic_rules(plan, plan.base)
    assert looked_up(rules, "model.layers.0.self_attn.qkv_proj") == {"bits": 8}
    assert looked_up(rules, "model.layers.0.mlp.gate_up_proj") == {}
    assert looked_up(rules, "model.layers.1.mlp.gate_up_proj") == "skip"
    # q_proj differs from k_proj and v_proj: no scheme is right for the three, and vLLM refuses the checkpoint.
    assert looked_up(rules, "model.layers.1.self_attn.qkv_proj") == {}


def test_a_uniform_plan_needs_no_rules(plan_of):
    plan = plan_of(bits=4)
    assert dynamic_rules(plan, plan.base) == skip_rules(plan) == {}


def test_rules_are_few(plan_of):
    plan = plan_of(model={"num_hidden_layers": 30}, bits=4, layer_config={"down_proj": 8, "layers.3.self_attn": 16})
    assert list(dynamic_rules(plan, plan.base)) == [
        r"+:model\.layers\.\d+\.mlp\.down_proj$",
        *(rf"-:model\.layers\.3\.self_attn\.{leaf}$" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")),
    ]


def test_experts_and_routers_are_skipped_with_all_that_is_below_them(plan_of):
    plan = plan_of("qwen3_moe", bits=4)
    for rules in (dynamic_rules(plan, plan.base), skip_rules(plan)):
        for name in ("mlp.experts", "mlp.experts.3.gate_proj", "mlp.gate"):
            assert looked_up(rules, f"model.layers.1.{name}") == "skip"
        assert looked_up(rules, "model.layers.1.self_attn.q_proj") == {}
        assert looked_up(rules, "model.layers.1.mlp.gate_proj") == {}
    assert {"model.layers.0.mlp.experts", "model.layers.1.mlp.gate", "lm_head"} <= set(skipped_modules(plan))


NAMES = st.sampled_from([f"model.layers.{b}.{leaf}" for b in (0, 1, 10, 11) for leaf in ("a", "b.c", "e.0.g", "e.1.g")])


@given(known=st.lists(NAMES, unique=True, min_size=1), data=st.data())
def test_patterns_match_the_chosen_names_and_no_other(known, data):
    chosen = data.draw(st.lists(st.sampled_from(known), unique=True))
    found = patterns(chosen, known)
    matched = {name for name in known if any(re.fullmatch(pattern, name) for pattern in found)}
    assert matched == set(chosen)


def optimum_quantizes(name, modules):
    return modules is None or any(name.endswith(module) for module in modules)


def vllm_quantizes(name, modules):
    return modules is None or any(module in name for module in modules)


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("quantizes", [optimum_quantizes, vllm_quantizes])
def test_the_list_of_modules_means_the_quantized_ones(quantizes, options, plan_of):
    plan = plan_of(model={"num_hidden_layers": 12}, **options)
    modules = quantized_in_blocks(plan)
    for entry in plan.entries:
        if entry.layer.block is not None:
            assert quantizes(entry.layer.name, modules) == entry.scheme.is_quantized
    if modules is not None:
        assert all(name in modules for name in (entry.layer.name for entry in plan.outside().values()))


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, None),
        ({"fp_layers": "down_proj,self_attn.[qko]"}, ["self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ({"fp_layers": "self_attn,up_proj,down_proj,layers.1.mlp"}, ["model.layers.0.mlp.gate_proj"]),
    ],
    ids=["all", "same-in-every-block", "differs-by-block"],
)  # fmt: skip
def test_modules_are_named_as_shortly_as_they_can_be(options, modules, plan_of):
    assert quantized_in_blocks(plan_of(bits=4, **options)) == modules


def test_the_most_common_scheme_wins_and_the_base_wins_a_tie(plan_of):
    most = most_common_scheme(plan_of(bits=4, layer_config={"proj": 8, "down_proj": 2}), FIELDS)
    assert most.bits == 8
    tie = plan_of(bits=4, model={"num_hidden_layers": 2}, layer_config={"layers.0": 8})
    assert most_common_scheme(tie, FIELDS).bits == 4
