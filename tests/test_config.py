import dataclasses
import json

import pytest

from auto_round.config import (
    PARTS,
    RECIPES,
    CalibConfig,
    EndToEndConfig,
    RunConfig,
    SchemeConfig,
    TuneConfig,
    parse_formats,
    parse_layer_config,
    parse_size,
)
from auto_round.errors import ConfigError
from auto_round.schemes import SCHEME_FIELDS, QuantizationScheme


def test_the_defaults_are_those_of_the_reference():
    config = RunConfig()
    assert (config.tune.iters, config.tune.batch_size, config.tune.nblocks, config.tune.seed) == (200, 8, 1, 42)
    assert (config.calib.nsamples, config.calib.seqlen) == (128, 2048)
    assert config.scheme.base_scheme() == QuantizationScheme(bits=4, group_size=128, sym=True)
    assert config.format == "auto_round"


# Source: the mission document's table of recipes; "light" keeps the step of 1/iters (config.py says why).
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("default", {"iters": 200, "nsamples": 128, "lr": None, "low_gpu_mem_usage": False}),
        ("best", {"iters": 1000, "nsamples": 512, "lr": None, "low_gpu_mem_usage": True}),
        ("light", {"iters": 50, "nsamples": 128, "lr": None, "low_gpu_mem_usage": False}),
    ],
)
def test_a_recipe_is_a_set_of_valid_options(recipe, expected):
    config = RunConfig.from_options(**RECIPES[recipe])
    found = {
        "iters": config.tune.iters,
        "nsamples": config.calib.nsamples,
        "lr": config.tune.lr,
        "low_gpu_mem_usage": config.low_gpu_mem_usage,
    }
    assert found == expected


def test_options_are_sent_to_the_dataclass_that_owns_them():
    config = RunConfig.from_options(bits=2, nsamples=7, iters=3, output_dir="x")
    assert (config.scheme.bits, config.calib.nsamples, config.tune.iters, config.output_dir) == (2, 7, 3, "x")


def test_the_name_of_a_preset_is_sent_to_the_scheme():
    config = RunConfig.from_options(scheme="W2A16G64", sym=False)
    assert config.scheme.base_scheme() == QuantizationScheme(bits=2, group_size=64, sym=False)


def test_no_option_has_two_owners():
    owned = [field.name for kind in PARTS.values() for field in dataclasses.fields(kind)]
    own = [field.name for field in dataclasses.fields(RunConfig) if field.name not in PARTS]
    assert len(set(owned + own)) == len(owned + own)


def test_each_option_has_a_line_of_help():
    for kind in (*PARTS.values(), RunConfig):
        for field in dataclasses.fields(kind):
            if field.name not in PARTS or kind is SchemeConfig:
                assert field.metadata["help"], field.name


def test_each_field_of_a_scheme_is_an_option():
    assert set(SCHEME_FIELDS) <= {field.name for field in dataclasses.fields(SchemeConfig)}


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown option 'nsample_'\. Did you mean 'nsamples'\?"):
        RunConfig.from_options(nsample_=3)


def test_all_unknown_options_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_options(itres=3, grupsize=3, bits=4)
    assert "'itres'. Did you mean 'iters'?" in str(caught.value)
    assert "'grupsize'" in str(caught.value)
    assert "'bits'" not in str(caught.value)


@pytest.mark.parametrize("name", ["calib", "tune", "end_to_end"])
def test_a_part_is_no_option(name):
    with pytest.raises(ConfigError, match=f"unknown option '{name}'"):
        RunConfig.from_options(**{name: {}})


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        pytest.param(CalibConfig, {"nsamples": 0, "seqlen": -1}, ["nsamples=0", "seqlen=-1"], id="calibration"),
        pytest.param(TuneConfig, {"iters": -1, "batch_size": 0}, ["iters=-1", "batch_size=0"], id="counts"),
        pytest.param(TuneConfig, {"lr": 0.0, "minmax_lr": -1.0}, ["lr=0.0", "minmax_lr=-1.0"], id="steps"),
        pytest.param(
            TuneConfig,
            {"lr_scheduler": "step", "sampler": "sorted"},
            ["lr_scheduler='step' (allowed: linear, cosine, constant)", "sampler='sorted' (allowed: rand, epoch)"],
            id="choices",
        ),
        pytest.param(
            TuneConfig, {"nblocks": 0, "gradient_accumulate_steps": 0}, ["nblocks=0", "gradient_acc"], id="groups"
        ),
        pytest.param(EndToEndConfig, {"e2e_steps": -1, "e2e_lr": 0.0}, ["e2e_steps=-1", "e2e_lr=0.0"], id="end to end"),
        pytest.param(RunConfig, {"model_dtype": "int8"}, ["model_dtype='int8'", "bf16"], id="model dtype"),
        pytest.param(RunConfig, {"max_shard_size": "5 apples"}, ["5 apples", "5GB"], id="shard size"),
    ],
)
def test_bad_values_of_a_config_are_reported_together(kind, options, parts):
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    for part in parts:
        assert part in str(caught.value)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TuneConfig().iters = 1  # type: ignore[misc]


def test_two_configs_share_no_layer_config():
    assert SchemeConfig().layer_config is not SchemeConfig().layer_config


@pytest.mark.parametrize(
    ("options", "rounding", "clip"),
    [
        pytest.param({}, 1 / 200, 1 / 200, id="one over the steps"),
        pytest.param({"iters": 50}, 1 / 50, 1 / 50, id="fewer steps"),
        pytest.param({"iters": 0}, 1.0, 1.0, id="no steps"),
        pytest.param({"lr": 0.01}, 0.01, 0.01, id="clip follows"),
        pytest.param({"lr": 0.01, "minmax_lr": 0.5}, 0.01, 0.5, id="both given"),
        pytest.param({"minmax_lr": 0.5}, 1 / 200, 0.5, id="clip given"),
    ],
)
def test_the_first_steps_follow_from_the_options(options, rounding, clip):
    config = TuneConfig(**options)
    assert config.rounding_step == rounding
    assert config.clip_step == clip


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"iters": 0}, True),
        ({"iters": 0, "disable_opt_rtn": True}, False),
        ({"disable_opt_rtn": True}, True),
    ],
    ids=str,
)
def test_only_plain_rounding_needs_no_text(options, needed):
    assert TuneConfig(**options).needs_calibration is needed


def test_options_override_the_fields_of_a_preset():
    config = SchemeConfig(scheme="W2A16G64", bits=3, sym=False, scale_dtype="bf16")
    assert config.base_scheme() == QuantizationScheme(bits=3, group_size=64, sym=False, scale_dtype="bfloat16")


def test_a_scheme_option_is_checked_with_the_preset():
    with pytest.raises(ConfigError, match="bits=11"):
        SchemeConfig(bits=11).base_scheme()
    with pytest.raises(ConfigError, match="unknown scheme 'W4A61'"):
        SchemeConfig(scheme="W4A61").base_scheme()


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
