"""Which layers a pattern means, and which places there are."""

from __future__ import annotations

import pytest

from auto_round.errors import ConfigError
from auto_round.layer_patterns import matches, matching
from auto_round.models.base import LinearInfo

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def layers_of(blocks=12, experts=0):
    """Returns the layers of a model; from the second block on with experts, a router and a shared expert, if any."""
    found = []
    for index in range(blocks):
        stem = f"model.layers.{index}"
        found += [LinearInfo(f"{stem}.self_attn.{leaf}", (64, 64), False, index) for leaf in LEAVES]
        if experts and index:
            found += [
                LinearInfo(f"{stem}.mlp.experts.{n}.{leaf}", (64, 64), False, index)
                for n in range(experts)
                for leaf in MLP
            ]
            found.append(LinearInfo(f"{stem}.mlp.gate", (experts, 64), False, index, "router"))
            found += [LinearInfo(f"{stem}.mlp.shared_experts.{leaf}", (64, 64), False, index) for leaf in MLP]
        else:
            found += [LinearInfo(f"{stem}.mlp.{leaf}", (64, 64), False, index) for leaf in MLP]
    return [*found, LinearInfo("lm_head", (96, 64), False, None)]


NAMES = [layer.name for layer in layers_of()]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        pytest.param("lm_head", 1, id="exact"),
        pytest.param("model.layers.1.mlp.up_proj", 1, id="exact inside"),
        pytest.param("q_proj", 12, id="leaf"),
        pytest.param("mlp", 36, id="substring"),
        pytest.param("layers.1", 7, id="number at the end is not continued"),
        pytest.param("layers.10", 7, id="two digits"),
        pytest.param("layers.1.", 7, id="dot at the end"),
        pytest.param("model.layers.*.mlp.up_proj", 12, id="glob"),
        pytest.param("*.q_proj", 12, id="glob from the start"),
        pytest.param("model.layers.[01].*", 14, id="glob of a class"),
        pytest.param("model.layers.?.self_attn.q_proj", 10, id="glob of one letter"),
        pytest.param("layers.*.mlp", 36, id="a glob that fits no whole name is a regular expression"),
        pytest.param(r"re:layers\.[02]\.", 14, id="marked regular expression"),
        pytest.param(r"layers\.\d\.mlp\.up_proj", 10, id="regular expression by its letters"),
        pytest.param("q_proj|k_proj", 24, id="alternatives"),
        pytest.param("^lm_head$", 1, id="anchors"),
        pytest.param("re:head", 1, id="marked without special letters"),
        pytest.param("nothing", 0, id="nothing"),
        pytest.param("re:nothing", 0, id="nothing by regular expression"),
        pytest.param("*.nothing", 0, id="nothing by glob"),
    ],
)
def test_a_pattern_means_so_many_layers(pattern, count):
    assert len(matches(pattern, NAMES)) == count


def test_layers_1_does_not_mean_layers_10():
    assert {name.split(".")[2] for name in matches("layers.1", NAMES)} == {"1"}


def test_an_exact_name_is_not_a_substring_of_others():
    assert matches("a.b", ["a.b", "a.b.c", "x.a.b"]) == ["a.b"]


@pytest.mark.parametrize("pattern", ["re:(", "a(b", "re:*"])
def test_a_broken_regular_expression_is_refused(pattern):
    with pytest.raises(ConfigError, match="no valid regular expression"):
        matches(pattern, NAMES)


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("blocks[0]", [0]),
        ("blocks[-1]", [11]),
        ("blocks[0:2]", [0, 1]),
        ("blocks[-2:]", [10, 11]),
        ("blocks[:3]", [0, 1, 2]),
        ("blocks[2:-8]", [2, 3]),
        ("blocks[:]", list(range(12))),
        ("blocks[10:99]", [10, 11]),
    ],
)
def test_blocks_are_chosen_as_python_slices_choose(pattern, blocks):
    layers = layers_of()
    assert matching(pattern, layers) == [layer.name for layer in layers if layer.block in blocks]


def test_a_pattern_after_blocks_chooses_among_their_layers():
    assert matching("blocks[-1:].down_proj", layers_of()) == ["model.layers.11.mlp.down_proj"]
    assert matching("blocks[:2].re:[qk]_proj", layers_of()) == [
        f"model.layers.{n}.self_attn.{leaf}_proj" for n in (0, 1) for leaf in "qk"
    ]


def test_non_expert_is_what_is_left_of_blocks_without_routed_experts_and_routers():
    layers = layers_of(3, experts=4)
    found = matching("non_expert", layers)
    assert len(found) == 7 + 2 * (4 + 3)
    assert all(".experts." not in name and not name.endswith("mlp.gate") and name != "lm_head" for name in found)
    assert "model.layers.1.mlp.shared_experts.up_proj" in found


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks[12]", r"no such blocks: the model has 12, blocks\[0\] to blocks\[11\]"),
        ("blocks[-13]", "no such blocks"),
        ("blocks[5:3]", "no such blocks"),
        ("blocks[]", r"write blocks\[2\], blocks\[0:2\] or blocks\[-2:\]"),
        ("non_expert", "the model has no routed experts"),
    ],
)
def test_a_place_that_is_not_there_is_refused(pattern, message):
    with pytest.raises(ConfigError, match=message):
        matching(pattern, layers_of())


def test_a_layer_of_that_name_comes_before_the_place():
    layers = [LinearInfo("non_expert", (64, 64), False, 0), *layers_of(2, experts=2)]
    assert matching("non_expert", layers) == ["non_expert"]
