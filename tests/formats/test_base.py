from pathlib import Path

import pytest

from auto_round.config import SchemeConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats import EXPORTERS, check, targets
from auto_round.formats.base import copied_dtype, differing_fields, folder_name, head_entry, holders, refusals
from auto_round.models import discover
from auto_round.option_values import parse_formats
from auto_round.plan import resolve
from auto_round.schemes import QuantizationScheme

OUT = Path("out")
BASE = QuantizationScheme(bits=4, group_size=32)


OTHER_NAMES = {"qdq": "fake", "llmcompressor": "llm_compressor"}


def plan_of(model, **options):
    return resolve(discover(model), SchemeConfig(**{"group_size": 32, **options}))


def test_every_registered_format_describes_itself():
    for name, exporter in EXPORTERS.items():
        assert exporter.summary
        assert exporter.name == name or name in OTHER_NAMES
    assert all(EXPORTERS[other] is EXPORTERS[name] for other, name in OTHER_NAMES.items())


def test_one_format_goes_into_the_output_folder_itself():
    (target,) = targets(("auto_round",), OUT)
    assert (target.exporter.name, target.folder) == ("auto_round", OUT)


def test_several_formats_go_into_folders_below_it():
    found = targets(("auto_round", "auto_round:auto_gptq", "fake"), OUT)
    assert [str(target.folder) for target in found] == ["out/auto-round", "out/auto-round-auto-gptq", "out/fake"]


def test_folders_of_all_formats_differ():
    assert len({folder_name(name) for name in EXPORTERS}) == len(list(EXPORTERS))


def test_an_unknown_format_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown format 'auto_rond'\. Did you mean 'auto_round'\? Known: "):
        targets(("fake", "auto_rond"), OUT)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("itrex", "auto_round"),
        ("itrex_xpu", "auto_round"),
        ("itrex:anything", "auto_round"),
        ("auto_round:mlx", "mlx"),
        ("svdquant_nunchaku", "auto_round"),
    ],
)
def test_a_format_that_is_gone_names_the_alternative(name, instead):
    with pytest.raises(UnsupportedError, match=f"format {name} is not written: .*Use {instead}"):
        targets(("fake", name), OUT)


def test_several_formats_that_are_gone_are_reported_together():
    with pytest.raises(UnsupportedError) as error:
        targets(("itrex", "itrex_xpu"), OUT)
    assert str(error.value).count("is not written") == 2


def test_reasons_of_all_formats_are_reported_together(make_model):
    plan = plan_of(make_model(), bits=3, act_bits=8, act_dynamic=False, act_group_size=0)
    with pytest.raises(UnsupportedError) as error:
        check(plan, [EXPORTERS["auto_round:auto_awq"], EXPORTERS["auto_round"], EXPORTERS["fake"]])
    lines = str(error.value).splitlines()
    assert any(line.startswith("auto_round:auto_awq: cannot store bits=3") for line in lines)
    assert any(line.startswith("auto_round: cannot store activations int8 per tensor static") for line in lines)
    assert "auto_round: this holds everything that was asked: --format fake" in lines
    assert not any(line.startswith("fake") for line in lines)


def test_formats_that_can_hold_a_plan_are_named_the_default_first_and_fake_last(make_model):
    able = holders(plan_of(make_model(), bits=3))
    assert able[0] == "--format auto_round"
    assert able[-1] == "--format fake"
    assert {"--format auto_gptq", "--format mlx"} < set(able)
    assert not {"--format auto_awq", "--format qdq"} & set(able)


@pytest.mark.parametrize(
    ("name", "parameter", "asked", "dtype"),
    [
        ("auto_gptq", "model.decoder.layers.0.fc1.bias", None, "float16"),
        ("auto_gptq", "model.decoder.layers.0.fc1.bias", "bfloat16", "float16"),
        ("auto_gptq", "model.decoder.layers.0.fc2.bias", None, None),
        ("auto_gptq", "model.decoder.layers.0.final_layer_norm.bias", "bfloat16", "bfloat16"),
        ("auto_gptq", None, None, None),
        ("fake", "model.decoder.layers.0.fc1.bias", None, None),
    ],
    ids=["bias", "wins", "of-16-bit-layer", "of-norm", "no-parameter", "plain-format"],
)
def test_biases_of_quantized_layers_have_the_dtype_of_the_container(make_model, name, parameter, asked, dtype):
    plan = plan_of(make_model("opt"), bits=4, fp_layers="fc2")
    assert copied_dtype(EXPORTERS[name], plan.quantized(), parameter, asked) == dtype


def test_what_a_layout_refuses_is_refused_though_the_format_declares_it(make_model):
    (reason,) = refusals(EXPORTERS["mlx"], plan_of(make_model(), bits=8, sym=False, scale_dtype="bf16"))
    assert "float16 holds it) for 14 layers" in reason


def test_formats_that_hold_a_plan_pass_without_a_word(make_model):
    check(plan_of(make_model(), bits=3), [EXPORTERS["auto_round"], EXPORTERS["fake"]])


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {}),
        ({"bits": 16}, {"bits": 16}),
        ({"bits": 8}, {"bits": 8}),
        ({"group_size": -1, "sym": False}, {"group_size": -1, "sym": False}),
        ({"scale_dtype": "bfloat16"}, {}),
        (
            {"act_bits": 8, "act_group_size": -1},
            {"act_bits": 8, "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": True},
        ),
    ],
    ids=["same", "16-bit", "bits", "group-and-sym", "scale-dtype-is-not-read", "activations"],
)
def test_fields_that_differ_are_those_that_engines_read(changes, fields):
    assert differing_fields(BASE.replace(**changes), BASE) == fields


def test_a_quantized_output_layer_is_described_in_full(make_model):
    assert head_entry(plan_of(make_model())) == {}
    assert head_entry(plan_of(make_model(), quant_lm_head=True)) == {
        "lm_head": {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    }


def test_formats_are_named_once_and_in_order():
    assert parse_formats(" fake, AUTO_ROUND ,fake") == ("fake", "auto_round")
    with pytest.raises(ConfigError, match="no export format"):
        parse_formats(" , ")
