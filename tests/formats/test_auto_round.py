import pytest

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.models import discover
from auto_round.plan import resolve

AWQ, GPTQ = "auto_round:auto_awq", "auto_round:auto_gptq"


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


def test_quantized_activations_are_for_the_tensors_of_compressed_tensors(make_plan):
    plan, config = make_plan(act_bits=8, act_group_size=-1)
    (reason,) = EXPORTERS[GPTQ].refusals(plan)
    assert "act_bits=8 (only 16)" in reason
    assert EXPORTERS["auto_round"].refusals(plan) == []
    written = EXPORTERS["auto_round"].quantization_config(plan, config)
    assert written["packing_format"] == "auto_round:llm_compressor"


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
