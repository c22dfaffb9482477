import json

import pytest
from transformers import AutoRoundConfig

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.inference.config import read_config
from auto_round.models import discover
from auto_round.plan import resolve

AWQ, GPTQ, COMPRESSED = "auto_round:auto_awq", "auto_round:auto_gptq", "auto_round:llm_compressor"


@pytest.fixture
def make_plan(make_model):
    """Returns make(**options) -> plan and config of a tiny model."""

    def make(kind="llama", **options):
        config = RunConfig.from_options(**{"group_size": 32, **options})
        return resolve(discover(make_model(kind)), config.scheme), config

    return make


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        ({"bits": 4}, GPTQ),
        ({"bits": 4, "sym": False}, AWQ),
        ({"bits": 2, "sym": False}, GPTQ),
        ({"bits": 3}, GPTQ),
        ({"bits": 8, "sym": False}, GPTQ),
        ({"bits": 4, "sym": False, "layer_config": {"down_proj": 8}}, GPTQ),
        ({"bits": 4, "sym": False, "layer_config": {"down_proj": {"sym": True}}}, GPTQ),
        ({"bits": 4, "sym": False, "layer_config": {"down_proj": 16}}, AWQ),
        ({"bits": 4, "sym": False, "layer_config": {"down_proj": {"group_size": 64}}}, AWQ),
        ({"bits": 8, "layer_config": {"proj": {"bits": 4, "sym": False}}}, AWQ),
    ],
    ids=[
        "w4",
        "w4asym",
        "w2asym",
        "w3",
        "w8asym",
        "mixed-bits",
        "mixed-sym",
        "some-16",
        "mixed-groups",
        "all-by-layer",
    ],
)
def test_the_packing_is_chosen_by_the_schemes_of_all_layers(options, packing, make_plan):
    plan, config = make_plan(**options)
    exporter = EXPORTERS["auto_round"]
    assert exporter.packing_for(plan) == packing
    assert exporter.quantization_config(plan, config)["packing_format"] == packing
    assert exporter.layout_for(plan.base, plan).name == {AWQ: "awq", GPTQ: "gptq"}[packing]
    assert exporter.refusals(plan) == []


@pytest.mark.parametrize(
    ("name", "layout"),
    [(AWQ, "awq"), (GPTQ, "gptq"), ("auto_round:gptqmodel", "gptq_zp")],
    ids=["awq", "gptq", "gptqmodel"],
)
def test_a_packing_that_was_asked_for_is_used(name, layout, make_plan):
    plan, config = make_plan(bits=4, sym=True)
    assert EXPORTERS[name].layout_for(plan.base, plan).name == layout
    assert EXPORTERS[name].quantization_config(plan, config)["packing_format"] == name


def test_awq_refuses_other_widths_with_the_number_of_layers(make_plan):
    plan, _ = make_plan(bits=4, layer_config={"down_proj": 8, "up_proj": 2})
    reasons = EXPORTERS[AWQ].refusals(plan)
    assert len(reasons) == 2
    assert reasons[0].startswith("cannot store bits=2 (only 4) for 2 layers, e.g. model.layers.0.mlp.up_proj.")
    assert "bits=8 (only 4) for 2 layers, e.g. model.layers.0.mlp.down_proj." in reasons[1]
    assert all("bits=4 with --layer_config" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["auto_round", AWQ, GPTQ, "auto_round:gptqmodel"])
def test_one_scale_for_a_whole_tensor_is_refused(name, make_plan):
    plan, _ = make_plan(bits=4, group_size=0)
    (reason,) = EXPORTERS[name].refusals(plan)
    assert "group_size=0" in reason
    assert "14 layers" in reason


@pytest.mark.parametrize("name", [AWQ, GPTQ, "auto_round:gptqmodel"])
def test_quantized_activations_are_refused_by_integer_layouts(name, make_plan):
    plan, _ = make_plan(bits=4, sym=False, act_bits=8, act_sym=True)
    (reason,) = EXPORTERS[name].refusals(plan)
    assert "act_bits=8 (only 16)" in reason


@pytest.mark.parametrize(
    ("scheme", "layout", "keys"),
    [
        ("MXFP4", "mxfp4", {"act_bits": 4, "act_group_size": 32, "act_data_type": "mx_fp", "act_dynamic": True}),
        (
            "NVFP4",
            "nvfp4",
            {"act_bits": 4, "act_group_size": 16, "act_data_type": "nv_fp4_with_static_gs", "act_dynamic": True},
        ),
        ("FP8_STATIC", "fp8", {"act_bits": 8, "act_group_size": 0, "act_data_type": "fp", "act_dynamic": False}),
        ("W4A8", "ct_packed", {"act_bits": 8, "act_group_size": -1, "act_data_type": "int", "act_dynamic": True}),
        ("MXFP4A16", "mxfp4", {}),
    ],
)
def test_floats_and_quantized_activations_take_the_tensors_of_compressed_tensors(scheme, layout, keys, make_plan):
    """Keys as the reference writes them for MXFP4 and NVFP4; vLLM's INC config reads them by these names."""
    options = {"scheme": scheme, "group_size": 32 if scheme == "W4A8" else None}
    plan, config = make_plan(**options)
    for name in ("auto_round", COMPRESSED):
        exporter = EXPORTERS[name]
        written = exporter.quantization_config(plan, config)
        assert (written["packing_format"], written["quant_method"]) == (COMPRESSED, "auto-round")
        assert exporter.layout_for(plan.base, plan).name == layout
        acts = {key: value for key, value in written.items() if key.startswith("act_")}
        assert acts == ({**keys, "act_sym": True} if keys else {})
        assert "enable_quanted_input" not in written  # its absence is what some branches of vLLM ask for
        assert exporter.refusals(plan) == []


def test_a_layer_with_other_activations_says_so(make_plan):
    layers = {"down_proj": "MXFP8", "o_proj": "MXFP4A16", "up_proj": 16}
    plan, config = make_plan(scheme="MXFP4", group_size=None, layer_config=layers, quant_lm_head=True)
    written = EXPORTERS["auto_round"].quantization_config(plan, config)["extra_config"]
    acts = {"act_bits": 8, "act_group_size": 32, "act_sym": True, "act_data_type": "mx_fp", "act_dynamic": True}
    assert written["model.layers.0.mlp.down_proj"] == {"bits": 8, **acts}
    assert written["model.layers.1.self_attn.o_proj"] == {"act_bits": 16}
    assert written["model.layers.1.mlp.up_proj"] == {"bits": 16}
    head = {"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp", **acts, "act_bits": 4}
    assert written["lm_head"] == head


BLOCKS = {"scheme": "FP8_BLOCK", "group_size": None}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "sym": False},
        {"bits": 2, "layer_config": {"down_proj": {"bits": 8, "sym": False}, "up_proj": 16}, "quant_lm_head": True},
        {"scheme": "MXFP4", "group_size": None, "layer_config": {"down_proj": "MXFP8", "o_proj": "MXFP4A16"}},
        {"scheme": "NVFP4", "group_size": None, "quant_lm_head": True},
        {"scheme": "INT8_W8A8", "group_size": None},
        {"scheme": "W4A8"},
        {"scheme": "FP8_STATIC", "group_size": None},
        BLOCKS,
        {**BLOCKS, "layer_config": {"down_proj": "FPW8A16", "up_proj": 16, "o_proj": "INT8_W8A8"}},
        {"scheme": "FP8_STATIC", "group_size": 0},
        {"scheme": "FPW8A16", "group_size": 0, "layer_config": {"down_proj": "FP8_DYNAMIC"}},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_is_written_is_what_the_loader_reads(options, make_plan):
    plan, config = make_plan(**options)
    exporter = EXPORTERS["auto_round"]
    written = json.loads(json.dumps(exporter.quantization_config(plan, config)))
    read = read_config(AutoRoundConfig.from_dict(written))
    for entry in plan.entries:
        found = read.resolve(entry.layer.name)
        if not entry.scheme.is_quantized:
            assert found is None
            continue
        scheme, layout = found
        assert layout == exporter.layout_for(entry.scheme, plan).name
        assert (scheme.bits, scheme.data_type, scheme.group_size, scheme.sym, scheme.activation) == (
            entry.scheme.bits, entry.scheme.data_type, entry.scheme.group_size, entry.scheme.sym,
            entry.scheme.activation,
        )  # fmt: skip


def test_what_compressed_tensors_cannot_hold_is_refused_here_too(make_plan):
    plan, _ = make_plan(scheme="MXFP6", group_size=None)
    reasons = EXPORTERS["auto_round"].refusals(plan)
    assert any("mx_fp6 weights (only" in reason or "bits=6" in reason for reason in reasons)


def test_the_config_says_what_differs_from_the_defaults_only(make_plan):
    plan, config = make_plan(bits=2, iters=7, dataset="calib.txt", seqlen=64)
    written = EXPORTERS["auto_round"].quantization_config(plan, config)
    assert {name: written[name] for name in ("bits", "iters", "seqlen", "dataset")} == {
        "bits": 2, "iters": 7, "seqlen": 64, "dataset": "calib.txt",
    }  # fmt: skip
    assert not {"lr", "minmax_lr", "nsamples", "batch_size", "seed", "scale_dtype", "nblocks"} & set(written)


def test_the_config_of_plain_rounding_names_no_dataset(make_plan):
    plan, config = make_plan(iters=0, disable_opt_rtn=True, dataset="calib.txt")
    assert "dataset" not in EXPORTERS["auto_round"].quantization_config(plan, config)


def test_the_default_dataset_is_not_named(make_plan):
    plan, config = make_plan()
    assert "dataset" not in EXPORTERS["auto_round"].quantization_config(plan, config)


def test_a_dataset_of_python_objects_is_not_named(make_plan):
    plan, config = make_plan(dataset=[[1, 2, 3]])
    assert "dataset" not in EXPORTERS["auto_round"].quantization_config(plan, config)


def test_a_base_of_16_bits_is_written_as_4_with_every_layer_named(make_plan):
    """Engines know no base of 16 bits: the layers that are quantized and those that are not are all told."""
    plan, config = make_plan(bits=16, layer_config={"down_proj": {"bits": 8}})
    written = EXPORTERS["auto_round"].quantization_config(plan, config)
    assert written["bits"] == 4
    assert written["extra_config"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert written["extra_config"]["model.layers.0.mlp.up_proj"] == {"bits": 16}


def test_a_base_of_16_bits_with_layers_of_4_bits_names_their_bits(make_plan):
    plan, config = make_plan(bits=16, layer_config={"down_proj": {"bits": 4}})
    written = EXPORTERS["auto_round"].quantization_config(plan, config)
    assert written["bits"] == 4
    assert written["extra_config"]["model.layers.1.mlp.down_proj"] == {"bits": 4}


@pytest.mark.parametrize(
    ("kind", "blocks"), [("llama", "model.layers"), ("opt", "model.decoder.layers"), ("gpt2", "transformer.h")]
)
def test_the_config_names_the_lists_of_blocks(kind, blocks, make_plan):
    plan, config = make_plan(kind)
    assert EXPORTERS["auto_round"].quantization_config(plan, config)["block_name_to_quantize"] == blocks
