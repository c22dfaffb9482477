import pytest
from transformers import AutoRoundConfig

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.inference.config import read_config
from auto_round.schemes import PRESET_SCHEMES

UP = "model.layers.1.mlp.up_proj"
INT8 = {"bits": 8, "group_size": -1, "act_bits": 8, "act_data_type": "int", "act_group_size": -1, "act_sym": True}
MXFP4 = {
    "bits": 4, "group_size": 32, "data_type": "mx_fp", "act_bits": 4, "act_data_type": "mx_fp", "act_group_size": 32,
    "act_sym": True, "act_dynamic": True, "packing_format": "auto_round:llm_compressor",
}  # fmt: skip


def resolved(name, **values):
    return read_config({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True} | values).resolve(name)


def describe(name, **values):
    plan = resolved(name, **values)
    return None if plan is None else (plan[0].bits, plan[0].group_size, plan[0].sym, plan[1])


@pytest.mark.parametrize(
    ("values", "layout", "sym"),
    [
        ({"quant_method": "gptq"}, "gptq", True),
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, "gptq", True),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False}, "gptq_zp", False),
        ({"quant_method": "awq", "zero_point": True}, "awq", False),
        ({"quant_method": "awq", "zero_point": False, "version": "gemm"}, "awq", True),
        ({"quant_method": "awq", "zero_point": True, "w_bit": 4, "q_group_size": 64}, "awq", False),
    ],
)
def test_foreign_checkpoints_are_understood(values, layout, sym):
    scheme, name = resolved(UP, **values)
    assert (name, scheme.sym) == (layout, sym)
    assert scheme.group_size == values.get("q_group_size", 128)
    # The same through Transformers, which fills in bits, group_size, sym and a packing format.
    assert read_config(AutoRoundConfig.from_dict(dict(values))).resolve(UP) == (scheme, name)


@pytest.mark.parametrize(
    "blocks",
    [
        {"block_name_to_quantize": "model.layers, model.visual.blocks"},
        {"to_quant_block_names": ["model.layers", "model.visual.blocks"]},
        {"quant_block_list": [["model.layers.0", "model.layers.1"], ["model.visual.blocks.0"]]},
    ],
    ids=["string", "list", "nested"],
)
def test_layers_are_quantized_inside_the_named_blocks_only(blocks):
    assert describe(UP, **blocks) == (4, 128, True, "gptq")
    assert describe("model.visual.blocks.0.attn.qkv", **blocks) is not None
    assert describe("model.layers_extra.0.up", **blocks) is None
    assert describe("lm_head", **blocks) is None


def test_a_block_is_not_a_prefix_of_its_number():
    assert describe("model.layers.10.up", block_name_to_quantize="model.layers.1") is None


def test_without_named_blocks_numbered_blocks_are_quantized():
    assert describe(UP) is not None
    assert describe("lm_head") is None
    assert describe("score") is None


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({UP: {"bits": 8}}, (8, 128, True, "gptq")),
        ({UP: {"bits": 2, "group_size": 32, "sym": False}}, (2, 32, False, "gptq")),
        ({UP: {"bits": 16}}, None),
        ({UP: {"bits": 32}}, None),
        ({UP: {"bits": 3, "act_bits": 16, "data_type": "int", "act_group_size": None}}, (3, 128, True, "gptq")),
        ({"mlp.up_proj": {"bits": 8}}, (4, 128, True, "gptq")),
        ({r".*mlp\.up_proj": {"bits": 8}}, (8, 128, True, "gptq")),
        ({r"layers\.1\..*up": {"bits": 8}}, (8, 128, True, "gptq")),
        ({r"up.*": {"bits": 2}, r"model.*up_proj": {"bits": 8}}, (8, 128, True, "gptq")),
        ({r".*up_proj": {"bits": 2}, UP: {"bits": 8}}, (8, 128, True, "gptq")),
        ({"model.layers.1": {"bits": 8}}, (4, 128, True, "gptq")),
    ],
    ids=[
        "exact",
        "all fields",
        "16 bits",
        "32 bits",
        "other keys",
        "part of a name",
        "regex",
        "searched regex",
        "full match before search",
        "exact before regex",
        "name of a block",
    ],
)
def test_extra_config_changes_the_layers_it_names(extra, expected):
    assert describe(UP, extra_config=extra) == expected


@pytest.mark.parametrize("key", ["layers.1.mlp.up_proj", f"model.{UP}"])
def test_names_are_found_with_and_without_model_in_front(key):
    name = UP if key.startswith("model.") else f"model.{key}"
    assert describe(name.removeprefix("model."), extra_config={name: {"bits": 8}}, block_name_to_quantize="x")[0] == 8


def test_lm_head_is_quantized_when_listed():
    full = {"bits": 8, "group_size": 32, "sym": False, "data_type": "int"}
    assert describe("lm_head", block_name_to_quantize="model.layers", extra_config={"lm_head": full})[0] == 8
    assert describe("lm_head", quant_method="gptq", lm_head=True) == (4, 128, True, "gptq")
    assert describe("lm_head", quant_method="gptq", lm_head=True, modules_to_not_convert=["lm_head"]) is None


@pytest.mark.parametrize(
    ("key", "is_skipped"),
    [
        ("up_proj", True),
        ("mlp", True),
        ("model.layers.1", True),
        ("up", False),
        ("layers.11", False),
        (r"mlp\..*", True),
    ],
)
def test_modules_to_not_convert_names_whole_parts(key, is_skipped):
    assert (describe(UP, modules_to_not_convert=[key]) is None) == is_skipped


def test_modules_in_block_to_quantize_limits_the_layers():
    only = [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]
    assert describe(UP, modules_in_block_to_quantize=only) is not None
    assert describe("model.layers.1.mlp.down_proj", modules_in_block_to_quantize=only) is None


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({r"-:.*\.up_proj": {}}, None),
        ({r"+:.*\.1\..*": {"bits": 8, "group_size": 32, "sym": False}}, (8, 32, False, "gptq")),
        ({r".*\.1\..*": {"bits": 8}}, (8, 128, True, "gptq")),
        ({r"+:up_proj": {"bits": 8}}, (4, 128, True, "gptq")),
        ({r"-:.*down": {}, r"+:.*": {"bits": 3}, r"-:.*up_proj": {}}, (3, 128, True, "gptq")),
    ],
    ids=["minus", "plus", "no sign", "matched from the start", "first rule wins"],
)
def test_gptq_dynamic_rules(dynamic, expected):
    assert describe(UP, quant_method="gptq", dynamic=dynamic) == expected
    assert describe("lm_head", quant_method="gptq", dynamic=dynamic) is None


@pytest.mark.parametrize(
    ("values", "group_index", "act_order"),
    [
        ({}, False, False),
        ({"quant_method": "gptq", "desc_act": False}, True, False),
        ({"quant_method": "gptq", "desc_act": True}, True, True),
        ({"quant_method": "gptq", "desc_act": True, "static_groups": True}, True, False),
    ],
)
def test_group_index_is_expected_of_gptq_checkpoints(values, group_index, act_order):
    config = read_config(values)
    assert (config.group_index, config.act_order) == (group_index, act_order)


@pytest.mark.parametrize(
    ("backend", "expected", "packing"),
    [
        ("torch", "torch", "gptq"),
        ("auto_round:gptq:exllamav2", "auto", "gptq"),
        ("autoround:awq", "auto", "awq"),
        ("auto_round:torch", "auto_round:torch", "gptq"),
    ],
)
def test_a_packing_in_the_backend_field_of_old_checkpoints_is_understood(backend, expected, packing):
    config = read_config(AutoRoundConfig(backend=backend))
    assert (config.backend, config.packing) == (expected, packing)


def test_names_are_also_known_as_transformers_renames_them():
    values = {"block_name_to_quantize": "visual.blocks", "extra_config": {"visual.blocks.0.qkv": {"bits": 8}}}
    config = read_config(values).renamed(lambda name: f"model.{name}" if name.startswith("visual.") else name)
    assert config.resolve("model.visual.blocks.0.qkv")[0].bits == 8
    assert config.resolve("model.visual.blocks.1.qkv")[0].bits == 4


@pytest.mark.parametrize("name", ["FP8_STATIC", "MXFP4", "MXFP8_RCEIL", "NVFP4", "INT8_W8A8", "W4A8", "MXINT4"])
def test_the_scheme_is_the_preset_that_the_config_was_written_from(name):
    scheme = PRESET_SCHEMES[name]
    values = {key: value for key, value in scheme.to_dict().items() if value is not None and key != "scale_dtype"}
    found, _ = resolved(UP, packing_format="auto_round:llm_compressor", **values)
    assert found == scheme


@pytest.mark.parametrize(
    ("values", "group_size"),
    [
        ({"group_size": [128, 64]}, (128, 64)),
        ({"group_size": 64, "weight_block_size": [128, 64]}, (128, 64)),
        ({"group_size": -1, "extra_config": {r".*layers.*": {"group_size": [128, 64]}}}, (128, 64)),
        ({"group_size": -1, "extra_config": {r".*layers.*": {"group_size": 0}}}, 0),
    ],
    ids=["list", "weight_block_size", "list by regex", "per tensor by regex"],
)
def test_blocks_and_whole_tensors_are_understood(values, group_size):
    scheme, layout = resolved(UP, bits=8, data_type="fp", packing_format="auto_round:fp8", **values)
    assert (scheme.group_size, layout) == (group_size, "fp8_flat")


def test_activations_of_16_bits_are_left_alone_whatever_else_is_said_of_them():
    scheme, _ = resolved(UP, **{**MXFP4, "act_bits": 16})
    assert scheme.activation is None
    scheme, _ = resolved(UP, **{**MXFP4, "act_bits": None})
    assert scheme.activation is None


def test_a_layer_may_have_other_activations_and_another_layout():
    extra = {UP: {"bits": 8, "act_bits": 8}, r".*down_proj": {"bits": 8, "act_bits": 16, "data_type": "int"}}
    up, down, other = (
        resolved(f"model.layers.1.mlp.{name}", **MXFP4, extra_config=extra)
        for name in ("up_proj", "down_proj", "gate_proj")
    )
    assert (up[1], up[0].activation.bits, up[0].activation.group_size) == ("mxfp8", 8, 32)
    assert (down[1], down[0].activation) == ("ct_packed", None)
    assert (other[1], other[0].activation.bits) == ("mxfp4", 4)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"rotation_config": {"kind": "hadamard"}}, UnsupportedError, r"rotated weights \(rotation_config\)"),
        ({"data_type": "nvfp4_v2"}, UnsupportedError, r"up_proj: data_type='nvfp4_v2' cannot be run \(only fp, "),
        ({"data_type": "mx_fp"}, UnsupportedError, r"up_proj: group_size=128 \(MX has groups of 32\) cannot be run"),
        ({"act_bits": 6}, UnsupportedError, r"up_proj: act_bits=6 .* \(only 4, 8\) cannot be run"),
        ({**INT8, "act_dynamic": False}, UnsupportedError, r"up_proj: act_group_size=-1 with calibrated ranges"),
        ({"bits": 9}, ConfigError, "bits=9"),
        ({"extra_config": {"*.up": {"bits": 8}}}, ConfigError, r"'\*\.up' in the quantization_config is no regular"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_can(values, error, text):
    with pytest.raises(error, match=text):
        resolved(UP, **values)
