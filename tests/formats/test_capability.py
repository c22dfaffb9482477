import dataclasses

import pytest

from auto_round.config import SchemeConfig
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.models import discover
from auto_round.plan import resolve
from auto_round.schemes import QuantizationScheme, preset_name_to_scheme

NARROW = SchemeSet(bits=frozenset({2, 4, 8}), sym=frozenset({True}), group_sizes=frozenset({32, 64}), per_row=False)
ANY = SchemeSet(data_types=None, bits=None, sym=None, per_tensor=True, act_bits=None)
FP8 = SchemeSet(
    data_types=frozenset({"fp"}), bits=frozenset({8}), group_sizes=frozenset({(128, 128)}), act_bits=frozenset({8}),
    act_data_types=frozenset({"fp"}), act_group_sizes=frozenset({0, 128}), act_dynamic=frozenset({False}),
)  # fmt: skip
FP8_FIELDS = {"data_type": "fp", "bits": 8, "act_bits": 8}
FIRST = "model.layers.0.self_attn.q_proj"


def holds(*sets, **fields):
    return Capability(schemes=sets or (NARROW,), loads_in="a test", **fields)


@pytest.fixture
def plan_of(make_model):
    """Returns make(kind, model, **options) -> plan of a tiny model whose layers have 64 and 128 inputs."""

    def make(kind="llama", model=None, **options):
        return resolve(discover(make_model(kind, **(model or {}))), SchemeConfig(**{"group_size": 32, **options}))

    return make


@pytest.mark.parametrize(
    ("schemes", "fields", "mismatches"),
    [
        (NARROW, {}, []),
        (NARROW, {"bits": 3}, [("bits=3 (only 2, 4, 8)", ("bits", 4))]),
        (NARROW, {"bits": 6}, [("bits=6 (only 2, 4, 8)", ("bits", 8))]),
        (NARROW, {"sym": False}, [("sym=False (only True)", ("sym", True))]),
        (NARROW, {"group_size": 128}, [("group_size=128 (only 32, 64)", ("group_size", 64))]),
        (NARROW, {"group_size": 16}, [("group_size=16 (only 32, 64)", ("group_size", 32))]),
        (NARROW, {"group_size": -1}, [("group_size=-1, one scale per row (only 32, 64)", ("group_size", 64))]),
        (NARROW, {"data_type": "mx_fp"}, [("data_type=mx_fp (only int)", ("data_type", "int"))]),
        (NARROW, {"act_bits": 8}, [("act_bits=8 (only 16)", ("act_bits", 16))]),
        (NARROW, {"bits": 3, "sym": False}, [
            ("bits=3 (only 2, 4, 8)", ("bits", 4)), ("sym=False (only True)", ("sym", True)),
        ]),
        (SchemeSet(), {"group_size": 17, "bits": 5, "sym": False}, []),
        (SchemeSet(), {"group_size": 0}, [(
            "group_size=0, one scale per tensor (only groups of any size, -1: one scale per row)", ("group_size", 128),
        )]),
        (ANY, {"data_type": "fp", "group_size": (2, 2), "act_bits": 8}, []),
        (FP8, {**FP8_FIELDS, "group_size": (128, 128), "act_group_size": 0, "act_dynamic": False}, []),
        (FP8, {**FP8_FIELDS, "group_size": (64, 64), "act_group_size": -1}, [
            ("act_group_size=-1 (only 0, 128)", ("act_group_size", 0)),
            ("act_dynamic=True (only False)", ("act_dynamic", False)),
            ("group_size=(64, 64) (only (128, 128), -1: one scale per row)", ("group_size", -1)),
        ]),
    ],
)  # fmt: skip
def test_each_field_out_of_the_set_is_named_with_the_nearest_value(schemes, fields, mismatches):
    scheme = QuantizationScheme.from_dict({"group_size": 32, **fields})
    found = schemes.mismatches(scheme, 128)
    assert [(mismatch.reason, mismatch.changes) for mismatch in found] == mismatches


@pytest.mark.parametrize(("width", "changes"), [(96, ("group_size", 64)), (48, None)])
def test_no_group_is_proposed_where_none_divides_the_inputs(width, changes):
    """A plan halves 64 to 32 for 96 inputs, but 48 inputs have no group of 32."""
    (mismatch,) = NARROW.mismatches(QuantizationScheme(group_size=48), width)
    assert mismatch.changes == changes
    assert "16 bits" in mismatch.remedy


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 3}, f"cannot store bits=3 (only 2, 4, 8) for 14 layers, e.g. {FIRST}. Use --bits 4"),
        ({"sym": False}, f"cannot store sym=False (only True) for 14 layers, e.g. {FIRST}. Leave out --asym"),
        (
            {"bits": 4, "layer_config": {"layers.1.mlp.down_proj": 5}},
            "cannot store bits=5 (only 2, 4, 8) for 1 layer, e.g. model.layers.1.mlp.down_proj. "
            "Give these layers bits=4 with --layer_config",
        ),
        (
            {"bits": 5, "layer_config": {"down_proj": 4}},
            f"cannot store bits=5 (only 2, 4, 8) for 12 layers, e.g. {FIRST}. Use --bits 4",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_ask_for(options, text, plan_of):
    assert holds().refusals(plan_of(**options)) == [text]


def test_a_plan_that_fits_has_no_refusals(plan_of):
    assert holds().refusals(plan_of(bits=2, layer_config={"down_proj": {"bits": 8, "group_size": 64}})) == []


def test_the_set_that_comes_nearest_gives_the_reasons(plan_of):
    eight = SchemeSet(bits=frozenset({8}), group_sizes=frozenset(), act_bits=frozenset({8}))
    (reason,) = holds(eight, NARROW).refusals(plan_of(bits=3))
    assert "bits=3 (only 2, 4, 8)" in reason


def test_layers_that_must_agree_are_counted_by_value(plan_of):
    capability = holds(uniform=("bits",))
    (reason,) = capability.refusals(plan_of(bits=4, layer_config={"down_proj": 8}))
    assert reason == (
        "cannot store layers that differ in bits: bits=4 (12 layers, e.g. model.layers.0.self_attn.q_proj), "
        "bits=8 (2 layers, e.g. model.layers.0.mlp.down_proj). Give all layers bits=4"
    )
    # A layer that cannot be held anyway is not counted again.
    assert len(capability.refusals(plan_of(bits=4, layer_config={"down_proj": 5}))) == 1


@pytest.mark.parametrize(
    ("fields", "kind", "model", "options", "part"),
    [
        ({"partial_groups": False}, "llama", {"intermediate_size": 84}, {}, "groups of 32 that do not divide 84"),
        ({"in_multiple": 128}, "llama", {}, {}, "64 inputs (only multiples of 128) for 12 layers"),
        ({"out_multiple": 64}, "llama", {}, {}, "32 outputs (only multiples of 64) for 4 layers"),
        ({"transposed": False}, "gpt2", {}, {}, "weights that the model stores transposed"),
        ({"head": False}, "llama", {}, {"quant_lm_head": True}, "output layer for 1 layer, e.g. lm_head. Leave out"),
        ({}, "opt", {"word_embed_proj_dim": 32}, {"layer_config": {"project_in": 4}}, "layers outside the blocks"),
    ],
    ids=["partial", "inputs", "outputs", "transposed", "head", "outside"],
)  # fmt: skip
def test_shapes_and_places_are_refused(fields, kind, model, options, part, plan_of):
    able = {"partial_groups": True, "outside": False, **fields}
    plan = plan_of(kind, model, bits=4, **options)
    (reason,) = [text for text in holds(SchemeSet(), **able).refusals(plan)]
    assert part in reason
    more = {
        "partial_groups": True,
        "in_multiple": 1,
        "out_multiple": 1,
        "transposed": True,
        "head": True,
        "outside": True,
    }
    assert holds(SchemeSet(), **more).refusals(plan) == []


def test_a_capability_describes_itself():
    assert holds(NARROW, FP8, uniform=("bits", "group_size"), head=False).describe() == {
        "data type": "int / fp", "bits": "2, 4, 8 / 8", "group size": "32, 64 / (128, 128), row",
        "symmetry": "sym / both", "act bits": "16 / 8", "mixed": "one bits and group_size", "lm_head": "no",
        "loads in": "a test",
    }  # fmt: skip
    assert holds(ANY).describe()["group size"] == "any, tensor"
    assert holds(SchemeSet()).describe()["bits"] == "2 to 8"


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4", "FP8_STATIC", "FP8_BLOCK", "INT8_W8A8", "W4A16"])
def test_every_preset_can_be_declared(preset):
    """A set made of one preset's own values holds it, and no other width of activations."""
    scheme = preset_name_to_scheme(preset)
    activation, size = scheme.activation, scheme.group_size
    own = SchemeSet(
        data_types=frozenset({scheme.data_type}), bits=frozenset({scheme.bits}), sym=frozenset({scheme.sym}),
        group_sizes=frozenset({size} - {-1, 0}), per_row=size == -1, per_tensor=size == 0,
        act_bits=frozenset({scheme.act_bits}),
        act_data_types=None if activation is None else frozenset({activation.data_type}),
        act_group_sizes=None if activation is None else frozenset({activation.group_size}),
        act_dynamic=None if activation is None else frozenset({activation.dynamic}),
    )  # fmt: skip
    assert own.mismatches(scheme, 128) == []
    other = dataclasses.replace(scheme, act_bits=5)
    assert any(mismatch.reason.startswith("act_bits=5") for mismatch in own.mismatches(other, 128))


FP8_ROWS = SchemeSet(
    data_types=frozenset({"fp"}), bits=frozenset({8}), group_sizes=frozenset(), act_bits=frozenset({8}),
    act_data_types=frozenset({"fp"}), act_group_sizes=frozenset({-1}),
)  # fmt: skip
FP8_WEIGHTS = dataclasses.replace(FP8_ROWS, act_bits=frozenset({16}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"act_group_size": 128}, "act_group_size=128 (only -1)"),
        ({"act_bits": 16, "group_size": 32}, "group_size=32 (only -1: one scale per row)"),
    ],
    ids=["activations stay quantized", "what has a cure is nearer"],
)
def test_the_nearest_set_is_the_one_that_changes_least(fields, reason, plan_of):
    blocks = dataclasses.replace(FP8_WEIGHTS, group_sizes=frozenset({(128, 128)}), per_row=False)
    scheme = QuantizationScheme.from_dict({"data_type": "fp", "bits": 8, "act_bits": 8, **fields})
    (entry,) = plan_of(scheme=scheme, group_size=scheme.group_size, layer_config={}).entries[:1]
    found = holds(FP8_WEIGHTS, blocks, FP8_ROWS).mismatches(entry, None)
    assert [mismatch.reason for mismatch in found] == [reason]
