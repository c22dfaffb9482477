from __future__ import annotations

import pytest

from auto_round.config import SchemeConfig
from auto_round.errors import ConfigError
from auto_round.models.base import LinearInfo, ModelStructure
from auto_round.plan import SIXTEEN_BIT, describe, resolve
from auto_round.schemes import QuantizationScheme

LEAVES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}


def structure_of(
    leaves: dict[str, tuple[int, int]] = LEAVES, *, layers: int = 12, head: str | None = "lm_head", tied: bool = False
) -> ModelStructure:
    blocks = tuple(f"model.layers.{index}" for index in range(layers))
    linears = [
        LinearInfo(f"{block}.{leaf}", shape, False, index)
        for index, block in enumerate(blocks)
        for leaf, shape in leaves.items()
    ]
    if head:
        linears.append(LinearInfo(head, (512, 128), False, None))
    other = {"model.embed_tokens.weight": "embedding"}
    return ModelStructure(blocks, tuple(linears), ("model.layers",), head, tied, other)


def plan_of(structure: ModelStructure | None = None, *, nblocks: int = 1, **options):
    return resolve(structure or structure_of(), SchemeConfig(**options), nblocks=nblocks)


def scheme_of(plan, layer: str) -> QuantizationScheme:
    return next(entry.scheme for entry in plan.entries if entry.layer.name == layer)


NAMES = [layer.name for layer in structure_of().linears]


def test_a_glob_that_fits_nothing_is_not_blamed_as_a_regular_expression():
    with pytest.raises(ConfigError, match=r"pattern '\*\.nothing' matches no linear layer"):
        plan_of(layer_config={"*.nothing": 8})


def test_blocks_are_quantized_and_the_head_is_not():
    plan = plan_of()
    assert len(plan.quantized()) == 12 * 7
    assert scheme_of(plan, "lm_head") == SIXTEEN_BIT
    assert plan.outside() == {}
    assert plan.entries[-1].reason == "output layer (--quant_lm_head quantizes it)"
    assert (plan.adjustments, plan.warnings) == ((), ())


def test_entries_keep_the_order_of_the_model():
    assert [entry.layer.name for entry in plan_of().entries] == NAMES


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param({"bits": 8}, QuantizationScheme(bits=8, group_size=64, sym=False), id="fields keep the rest"),
        pytest.param(8, QuantizationScheme(bits=8, group_size=64, sym=False), id="number of bits"),
        pytest.param("W8A16", QuantizationScheme(bits=8), id="a preset sets all fields"),
        pytest.param(QuantizationScheme(bits=8), QuantizationScheme(bits=8), id="scheme"),
        pytest.param(
            {"bits": 2, "group_size": None, "sym": True},
            QuantizationScheme(bits=2, group_size=64, sym=True),
            id="None keeps a field",
        ),
        pytest.param(16, QuantizationScheme(bits=16, group_size=64, sym=False), id="sixteen bits"),
    ],
)
def test_a_layer_takes_what_its_rule_says(value, expected):
    plan = plan_of(group_size=64, sym=False, layer_config={"layers.0.mlp.up_proj": value})
    assert scheme_of(plan, "model.layers.0.mlp.up_proj") == expected
    assert scheme_of(plan, "model.layers.1.mlp.up_proj") == QuantizationScheme(group_size=64, sym=False)


def test_later_patterns_win():
    plan = plan_of(layer_config={"mlp": 8, "down_proj": 3, "layers.2": 2})
    assert scheme_of(plan, "model.layers.0.mlp.up_proj").bits == 8
    assert scheme_of(plan, "model.layers.0.mlp.down_proj").bits == 3
    assert scheme_of(plan, "model.layers.2.mlp.down_proj").bits == 2
    assert scheme_of(plan, "model.layers.0.self_attn.q_proj").bits == 4


def test_an_exact_name_wins_over_later_patterns():
    plan = plan_of(layer_config={"model.layers.0.mlp.down_proj": 8, "down_proj": 2})
    assert scheme_of(plan, "model.layers.0.mlp.down_proj").bits == 8
    assert scheme_of(plan, "model.layers.1.mlp.down_proj").bits == 2


def test_fp_layers_win_over_everything():
    plan = plan_of(layer_config={"model.layers.0.mlp.down_proj": 8}, fp_layers="layers.0.mlp, layers.3 ,")
    assert not scheme_of(plan, "model.layers.0.mlp.down_proj").is_quantized
    assert scheme_of(plan, "model.layers.0.self_attn.q_proj").is_quantized
    assert not scheme_of(plan, "model.layers.3.self_attn.q_proj").is_quantized
    assert scheme_of(plan, "model.layers.10.mlp.up_proj").is_quantized


def test_the_reason_names_the_pattern():
    plan = plan_of(layer_config={"up_proj": 8})
    reasons = {entry.reason for entry in plan.entries if entry.layer.name.endswith("up_proj")}
    assert reasons == {"by 'up_proj'"}


def test_a_pattern_without_a_layer_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        plan_of(layer_config={"dwon_proj": 8})
    assert "pattern 'dwon_proj' matches no linear layer. Did you mean 'down_proj'?" in str(caught.value)
    assert "gate_proj, k_proj, lm_head" in str(caught.value)


def test_all_problems_are_reported_in_one_error():
    with pytest.raises(ConfigError) as caught:
        plan_of(
            structure_of(head=None),
            layer_config={
                "qq_proj": 8,
                "up_proj": {"bitts": 3},
                "k_proj": 11,
                "re:(": 4,
                "o_proj": True,
                "v_proj": "W4A61",
            },
            fp_layers="no_such_layer",
            quant_lm_head=True,
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 8
    for part in (
        "pattern 'qq_proj' matches no linear layer. Did you mean 'q_proj'?",
        "'up_proj': unknown scheme option 'bitts'. Did you mean 'bits'?",
        "'k_proj': bad quantization scheme: bits=11",
        "'re:(': '(' is no valid regular expression",
        "'o_proj': True is no scheme",
        "'v_proj': unknown scheme 'W4A61'. Did you mean 'W4A16'?",
        "pattern 'no_such_layer' matches no linear layer",
        "quant_lm_head was asked for, but the model has no output layer",
    ):
        assert any(part in line for line in lines), part


def test_nothing_left_to_quantize_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to quantize"):
        plan_of(fp_layers="layers")


def test_the_head_is_quantized_on_demand():
    plan = plan_of(quant_lm_head=True)
    assert scheme_of(plan, "lm_head") == QuantizationScheme()
    assert list(plan.outside()) == ["lm_head.weight"]


def test_a_tied_head_is_untied_and_that_is_said():
    plan = plan_of(structure_of(tied=True), quant_lm_head=True)
    assert plan.outside()["lm_head.weight"].reason == "quant_lm_head, untied from the embedding"


def test_a_rule_for_the_head_quantizes_it():
    plan = plan_of(layer_config={"lm_head": 8})
    assert plan.outside()["lm_head.weight"].scheme.bits == 8


@pytest.mark.parametrize(
    ("width", "asked", "got", "field", "new"),
    [
        # 352 = 32 * 11, 172 = 4 * 43, 24 = 8 * 3.
        pytest.param(352, 128, 32, "group_size", 32, id="352: 32 divides"),
        pytest.param(352, 64, 32, "group_size", 32, id="352 by 64"),
        pytest.param(192, 128, 64, "group_size", 64, id="192: 64 divides"),
        pytest.param(80, 32, 16, "group_size", 16, id="80: 16 divides"),
        pytest.param(172, 128, 128, "last group", 44, id="172: last group of 44"),
        pytest.param(172, 32, 32, "last group", 12, id="172: last group of 12"),
        pytest.param(24, 128, -1, "group_size", -1, id="24: shorter than a group"),
        pytest.param(64, 128, 64, "group_size", 64, id="64: the whole row"),
    ],
)
def test_a_group_that_does_not_fit_is_changed_and_reported(width, asked, got, field, new):
    plan = plan_of(structure_of({"mlp.up_proj": (8, width)}, layers=1), group_size=asked)
    assert scheme_of(plan, "model.layers.0.mlp.up_proj").group_size == got
    (change,) = plan.adjustments
    assert (change.layer, change.field, change.old, change.new) == ("model.layers.0.mlp.up_proj", field, asked, new)
    assert str(asked) in str(change)
    assert change.why in plan.entries[0].reason


@pytest.mark.parametrize("group_size", [-1, 0, 43, 172])
def test_a_group_that_fits_is_left_alone(group_size):
    plan = plan_of(structure_of({"mlp.up_proj": (8, 172)}, layers=1), group_size=group_size)
    assert scheme_of(plan, "model.layers.0.mlp.up_proj").group_size == group_size
    assert plan.adjustments == ()


def test_layers_kept_in_16_bits_are_not_adjusted():
    leaves = {"mlp.up_proj": (8, 172), "mlp.down_proj": (8, 128)}
    assert plan_of(structure_of(leaves, layers=1), fp_layers="up_proj").adjustments == ()


def test_a_number_that_is_no_power_of_two_never_gives_a_larger_group():
    plan = plan_of(structure_of({"mlp.up_proj": (8, 160)}, layers=1), group_size=100)
    scheme = scheme_of(plan, "model.layers.0.mlp.up_proj")
    assert scheme.group_size in (100, 50, 25)
    assert len(plan.adjustments) == 1


def test_layers_that_engines_fuse_should_have_one_scheme():
    plan = plan_of(layer_config={"layers.1.self_attn.k_proj": 8, "layers.2.mlp.up_proj": 8})
    why = "have different schemes; vLLM and SGLang join them and will refuse"
    assert plan.warnings == (
        f"model.layers.1.self_attn: q_proj/k_proj/v_proj {why}",
        f"model.layers.2.mlp: gate_proj/up_proj {why}",
    )


def test_layers_that_are_not_fused_may_differ():
    assert plan_of(layer_config={"down_proj": 8, "o_proj": 2}).warnings == ()


def test_average_bits_by_hand():
    # 4 bits, groups of 128, 128 inputs: 4 + (16 + 4) / 128 = 4.15625 for the first layer, 16384 weights.
    # 8 bits, groups of 64, 256 inputs: 8 + 4 * (16 + 8) / 256 = 8.375 for the second, 32768 weights; the head is out.
    leaves = {"q_proj": (128, 128), "down_proj": (128, 256)}
    plan = plan_of(structure_of(leaves, layers=3), layer_config={"down_proj": {"bits": 8, "group_size": 64}})
    bits = {entry.layer.name.rpartition(".")[2]: entry.stored_bits for entry in plan.entries}
    assert bits == {"q_proj": 4.15625, "down_proj": 8.375, "lm_head": 16.0}
    assert plan.average_bits() == pytest.approx((4.15625 + 2 * 8.375) / 3, rel=1e-12)


def test_float32_scales_count_twice():
    plan = plan_of(structure_of({"q_proj": (128, 128)}, layers=1), scale_dtype="fp32")
    assert plan.entries[0].stored_bits == 4 + (32 + 4) / 128


def test_a_shorter_last_group_counts_its_scale():
    plan = plan_of(structure_of({"q_proj": (8, 172)}, layers=1))
    assert plan.entries[0].stored_bits == 4 + 2 * 20 / 172


def test_one_scale_per_tensor_counts_once():
    # 128 rows of 128 weights share one scale of 16 bits and one zero point of 4.
    plan = plan_of(structure_of({"q_proj": (128, 128)}, layers=1), group_size=0)
    assert plan.entries[0].stored_bits == 4 + 20 / 128**2


def test_layers_in_16_bits_count_as_16():
    leaves = {"q_proj": (64, 128), "o_proj": (64, 128)}
    plan = plan_of(structure_of(leaves, layers=1), fp_layers="o_proj")
    assert plan.average_bits() == (4.15625 + 16) / 2


@pytest.mark.parametrize(
    ("nblocks", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])], ids=lambda value: str(value)
)
def test_consecutive_blocks_are_tuned_together(nblocks, sizes):
    plan = plan_of(structure_of(layers=5), nblocks=nblocks)
    assert [len(group) for group in plan.groups] == sizes
    assert sum(plan.groups, ()) == plan.structure.blocks


def test_the_weights_of_a_group_are_those_of_its_blocks_only():
    plan = plan_of()
    found = plan.in_group(["model.layers.1"])
    assert len(found) == 7
    assert all(name.startswith("model.layers.1.") and name.endswith(".weight") for name in found)


def test_describe_says_everything_that_was_decided():
    leaves = {"self_attn.q_proj": (8, 128), "self_attn.k_proj": (8, 128), "mlp.down_proj": (8, 352)}
    text = describe(plan_of(structure_of(leaves, layers=3), layer_config={"layers.1.self_attn.k_proj": 8}))
    lines = text.splitlines()
    assert lines[0].split() == ["layers", "count", "shape", "becomes", "bits", "MB", "why"]
    row = "model.layers.*.self_attn.q_proj 3 8 x 128 int4 g128 sym 4.16 0.0 in a block"
    assert row in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("model.layers.*.self_attn.k_proj") and "int8 g128 sym" in line for line in lines)
    assert any("int4 g32 sym" in line and "128 does not divide 352 inputs" in line for line in lines)
    assert "model.embed_tokens.weight  stays: embedding" in lines
    assert any(line.startswith("average bits of block weights, scales counted: ") for line in lines)
    assert sum(line.startswith("changed: ") for line in lines) == 3
    assert sum(line.startswith("note: model.layers.1.self_attn") for line in lines) == 1
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("non_experts", "pattern 'non_experts' matches no linear layer. Did you mean 'non_expert'?"),
        ("blocks[99]", "'blocks[99]': no such blocks: the model has 12"),
    ],
)
def test_a_place_that_the_model_does_not_have_is_refused(pattern, message):
    with pytest.raises(ConfigError) as caught:
        plan_of(layer_config={pattern: 8})
    assert message in str(caught.value)


def test_head_and_tail_get_what_is_said_of_their_places():
    plan = plan_of(bits=2, layer_config={"blocks[:1]": 8, "blocks[-1:].down_proj": 16}, fp_layers="blocks[-2].o_proj")
    assert scheme_of(plan, "model.layers.0.mlp.up_proj").bits == 8
    assert scheme_of(plan, "model.layers.11.mlp.down_proj") == SIXTEEN_BIT
    assert scheme_of(plan, "model.layers.10.self_attn.o_proj") == SIXTEEN_BIT
    assert scheme_of(plan, "model.layers.11.mlp.up_proj").bits == 2
