import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import auto_round
from auto_round import AutoRound, AutoRoundAdam, AutoRoundMLLM, QuantizationScheme, blockwise, pipeline, tune_block
from auto_round.calibration import CalibrationSet
from auto_round.config import PARTS, RunConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.models import discover
from auto_round.session import open_session
from auto_round.tuning import SearchedRounding, round_plain

FAST = {"iters": 3, "batch_size": 4, "group_size": 32, "device": "cpu", "seqlen": 16, "nsamples": 8}
ROUNDING = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}


@pytest.fixture
def ids(token_ids):
    return CalibrationSet(token_ids(8, 16))


# --- construction -----------------------------------------------------------------------------------------------


def test_positional_arguments_are_in_the_order_users_write(make_model):
    """`AutoRound(model, tokenizer, bits, group_size, sym)`, as the existing package's README has it."""
    model, tokenizer = make_model(), object()
    given = AutoRound(model, tokenizer, 2, 32, False, {"down_proj": {"bits": 8}}, 4, False, "cpu", "calib.txt")
    config = given.config
    assert given.model is model
    assert given.tokenizer is tokenizer
    assert (config.scheme.bits, config.scheme.group_size, config.scheme.sym) == (2, 32, False)
    assert config.scheme.layer_config == {"down_proj": {"bits": 8}}
    assert (config.tune.batch_size, config.tune.amp, config.device) == (4, False, "cpu")
    assert config.calib.dataset == "calib.txt"


def test_a_scheme_is_taken_by_name_with_single_options_on_top(make_model):
    assert AutoRound(make_model(), scheme="W2A16G64", sym=False).plan.base == QuantizationScheme(
        bits=2, group_size=64, sym=False
    )


def test_an_unknown_keyword_is_answered_with_the_nearest(make_model):
    with pytest.raises(ConfigError, match=r"unknown option 'group_sise'\. Did you mean 'group_size'\?"):
        AutoRound(make_model(), group_sise=32)


def test_all_unknown_keywords_are_reported_together(make_model):
    with pytest.raises(ConfigError, match=r"'foo'.*'itres'\. Did you mean 'iters'"):
        AutoRound(make_model(), foo=1, itres=3)


def test_an_argument_given_twice_and_too_many_positional_ones_are_errors(make_model):
    with pytest.raises(ConfigError, match="given twice: bits"):
        AutoRound(make_model(), None, 4, bits=4)
    with pytest.raises(ConfigError, match="at most 10 positional"):
        AutoRound(*range(11))


@pytest.mark.parametrize(
    ("options", "part", "field", "value"),
    [
        ({"enable_adam": True}, "tune", "adam", True),
        ({"ignore_layers": "o_proj"}, "scheme", "fp_layers", "o_proj"),
        ({"device_map": 0}, None, "device", "0"),
        ({"layer_config": '{"o_proj": 8}'}, "scheme", "layer_config", {"o_proj": 8}),
        ({"lr": None, "bits": None}, "scheme", "bits", None),
    ],
    ids=["enable_adam", "ignore_layers", "device_map", "layer_config-as-text", "None-is-the-default"],
)
def test_other_spellings_of_the_existing_package_are_taken(options, part, field, value, make_model):
    config = AutoRound(make_model(), **options).config
    assert getattr(getattr(config, part) if part else config, field) == value


def test_options_for_what_is_always_so_are_taken_and_said(make_model, caplog):
    with caplog.at_level("INFO"):
        AutoRound(make_model(), low_cpu_mem_usage=True, disable_deterministic_algorithms=False)
    assert "low_cpu_mem_usage has no effect" in caplog.text


def test_bad_values_are_errors_before_any_work(make_model):
    with pytest.raises(ConfigError, match="bits=9"):
        AutoRound(make_model(), bits=9)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        AutoRound(make_model(), layer_config={"no_such_layer": 8})


def test_the_signature_lists_every_option_with_its_default():
    parameters = inspect.signature(AutoRound).parameters
    assert list(parameters)[:5] == ["model", "tokenizer", "bits", "group_size", "sym"]
    options = {name for owner in PARTS.values() for name in owner.__dataclass_fields__}
    options |= set(RunConfig.__dataclass_fields__) - {*PARTS, "model"}
    assert options == set(parameters) - {"model", "tokenizer", "recipe"}
    assert "scheme" in parameters
    assert parameters["iters"].default == 200
    assert parameters["layer_config"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters["iters"].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_public_name_exists():
    for name in auto_round.__all__:
        if name != "AutoRoundConfig":  # Transformers' own class
            assert getattr(auto_round, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = auto_round.no_such_name


# --- quantize and save ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantize_returns_the_model_with_dequantized_weights_and_the_layers(kind, make_model, ids):
    model = make_model(kind)
    before = copy.deepcopy(model)
    rounder = AutoRound(model, None, 4, 32, dataset=ids, **{k: v for k, v in FAST.items() if k != "group_size"})
    returned, layers = rounder.quantize()
    assert returned is model
    names = {linear.name for linear in discover(model).linears if linear.block is not None}
    assert set(layers) == names
    assert all(fields["bits"] == 4 and fields["group_size"] == 32 for fields in layers.values())
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before.get_parameter(name))
        assert changed == (name.removesuffix(".weight") in names), name
    codes = next(iter(model.state_dict()[f"{name}.weight"] for name in names))
    transposed = kind == "gpt2"
    row = (codes.t() if transposed else codes)[0, :32]
    assert row.unique().numel() <= 16  # a group of 4-bit weights has no more levels


def test_quantized_weights_in_memory_are_those_that_are_saved(make_model, ids, tmp_path):
    model = make_model()
    rounder = AutoRound(model, dataset=ids, **FAST)
    rounder.quantize()
    rounder.save_quantized(tmp_path / "out", format="fake")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_folder_is_quantized_without_loading_it(make_model, ids, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    rounder = AutoRound(str(tmp_path / "model"), dataset=ids, **FAST)
    model, layers = rounder.quantize()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(layers) == 14
    folders = rounder.save_quantized(tmp_path / "out", format="auto_round,fake")
    assert [folder.name for folder in folders] == ["auto-round", "fake"]


def test_a_model_in_memory_saves_what_its_folder_saves(make_model, ids, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    AutoRound(str(tmp_path / "model"), dataset=ids, **FAST).quantize_and_save(tmp_path / "a")
    AutoRound(make_model(), dataset=ids, **FAST).quantize_and_save(tmp_path / "b")
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_quantize_and_save_returns_the_model_and_the_folders(make_model, tmp_path):
    model = make_model()
    returned, folders = AutoRound(model, **ROUNDING).quantize_and_save(str(tmp_path / "out"), inplace=True)
    assert returned is model
    assert folders == [tmp_path / "out"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_saving_again_in_another_format_needs_no_second_run(make_model, tmp_path, monkeypatch):
    rounder = AutoRound(make_model(), **ROUNDING)
    rounder.quantize_and_save(tmp_path / "a")
    monkeypatch.setattr(pipeline, "quantize", lambda *_: pytest.fail("quantized twice"))
    assert rounder.save_quantized(tmp_path / "b", format="auto_round:gptqmodel") == [tmp_path / "b"]


def test_saving_before_quantizing_is_an_error(make_model, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing is quantized yet: call quantize\(\) first"):
        AutoRound(make_model()).save_quantized(tmp_path)


def test_a_format_that_cannot_hold_the_plan_is_refused_before_any_work(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "quantize", lambda *_: pytest.fail("worked before checking"))
    with pytest.raises(UnsupportedError, match="bits=3"):
        AutoRound(make_model(), bits=3, **ROUNDING).quantize_and_save(tmp_path, format="auto_round:auto_awq")
    with pytest.raises(UnsupportedError, match="itrex is not written"):
        AutoRound(make_model(), **ROUNDING).quantize_and_save(tmp_path, format="itrex")
    with pytest.raises(ConfigError, match="Did you mean 'auto_round'"):
        AutoRound(make_model(), **ROUNDING).quantize_and_save(tmp_path, format="auto_roun")
    with pytest.raises(ConfigError, match="does not know safe_serialisation"):
        AutoRound(make_model(), **ROUNDING).quantize_and_save(tmp_path, safe_serialisation=True)


def test_writing_over_the_original_model_is_refused_before_any_work(make_model, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pipeline, "quantize", lambda *_: pytest.fail("worked before checking"))
    with pytest.raises(ConfigError, match="holds the original model"):
        AutoRound(str(tmp_path / "model"), **ROUNDING).quantize_and_save(tmp_path / "model")


def test_a_named_work_folder_is_kept_and_resumed(make_model, ids, tmp_path, monkeypatch):
    options = {**FAST, "dataset": ids, "work_dir": str(tmp_path / "work")}
    AutoRound(make_model(), **options).quantize_and_save(tmp_path / "a")
    monkeypatch.setattr(blockwise, "tuner_for", lambda *_: pytest.fail("tuned again"))
    AutoRound(make_model(), resume=True, **options).quantize_and_save(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_token_ids_need_no_tokenizer(make_model, token_ids, tmp_path):
    rows = [row.tolist() for row in token_ids(8, 16)]
    AutoRound(make_model(), None, dataset=rows, **FAST).quantize_and_save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_text_without_a_tokenizer_is_an_error_that_says_what_to_give(make_model, tmp_path):
    (tmp_path / "calib.txt").write_text("words " * 500)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        AutoRound(make_model(), None, dataset=str(tmp_path / "calib.txt"), **FAST).quantize()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_output_layer_is_written_back_and_leaves_the_embedding(tied, make_model):
    model = make_model(tie_word_embeddings=tied)
    original = model.lm_head.weight.detach().clone()
    embedding = model.model.embed_tokens.weight.detach().clone()
    _, layers = AutoRound(model, quant_lm_head=True, **ROUNDING).quantize()
    assert "lm_head" in layers
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    expected = round_plain(original, QuantizationScheme(bits=4, group_size=32)).dequantize()
    assert torch.equal(model.lm_head.weight, expected)


def test_precision_and_gradients_of_a_model_stay(make_model):
    model = make_model().to(torch.bfloat16)
    AutoRound(model, **ROUNDING).quantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_adam_is_autoround_with_adam(make_model, ids):
    rounder = AutoRoundAdam(make_model(), None, 4, 32, dataset=ids, iters=2, device="cpu")
    assert rounder.config.tune.adam
    rounder.quantize()
    assert not AutoRound(make_model()).config.tune.adam


def test_the_class_for_vision_models_takes_its_extra_arguments(make_model):
    rounder = AutoRoundMLLM(make_model(), None, "processor", "images", bits=2)
    assert (rounder.processor, rounder.image_processor, rounder.config.scheme.bits) == ("processor", "images", 2)


# --- tune_block -------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, hidden, scale=1.0):
        return hidden + scale * self.down(torch.relu(self.up(self.norm(hidden)))), "something else"


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def inputs():
    return torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(1))


def block_error(block, result, inputs, targets):
    replaced = {name: weight.dequantize() for name, weight in result.weights.items()}
    with torch.no_grad():
        output = torch.func.functional_call(block, replaced, (inputs,))[0]
    return float((output - targets).square().mean())


def test_tune_block_tunes_any_module_below_plain_rounding(mlp, inputs):
    with torch.no_grad():
        targets = mlp(inputs)[0]
    state = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    scheme = QuantizationScheme(bits=2, group_size=32)
    tuned = tune_block(mlp, inputs, scheme=scheme, iters=20)
    plain = tune_block(mlp, inputs, scheme=scheme, iters=0, disable_opt_rtn=True)
    assert set(tuned.weights) == {"up.weight", "down.weight"}
    assert block_error(mlp, tuned, inputs, targets) < block_error(mlp, plain, inputs, targets)
    assert torch.equal(plain.weights["up.weight"].codes, round_plain(mlp.up.weight.detach(), scheme).codes)
    assert all(torch.equal(tensor, state[name]) for name, tensor in mlp.state_dict().items())


def test_tune_block_gives_what_the_pipeline_gives(make_model, ids, tmp_path):
    """The same block with the same inputs: only the seed is mixed with another name, so one fixed order is used."""
    model = make_model()
    options = {"iters": 0, "batch_size": 4}
    config = RunConfig.from_options(model=model, dataset=ids, group_size=32, device="cpu", **options)
    session = open_session(config)
    stored = pipeline.quantize(session, tmp_path / "w").load("model.layers.0")
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids.input_ids)
        rotary = model.model.rotary_emb(hidden, torch.arange(16)[None])
    found = tune_block(
        model.model.layers[0], hidden, scheme="W4A16G32", arguments={"position_embeddings": rotary}, **options
    )
    assert len(found.weights) == len(stored.weights) == 7
    for name, weight in found.weights.items():
        assert torch.equal(weight.codes, stored.weights[f"model.layers.0.{name}"].codes), name
        assert torch.equal(weight.scale, stored.weights[f"model.layers.0.{name}"].scale), name


def test_tuned_steps_of_tune_block_equal_the_pipelines(make_model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(blockwise, "block_seed", lambda seed, _name: seed)
    model = make_model()
    config = RunConfig.from_options(model=model, dataset=ids, **{**FAST, "iters": 5, "bits": 2}, e2e_steps=0)
    stored = pipeline.quantize(open_session(config), tmp_path / "w").load("model.layers.0")
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids.input_ids)
        rotary = model.model.rotary_emb(hidden, torch.arange(16)[None])
    found = tune_block(
        model.model.layers[0], hidden, scheme="W2A16G32", arguments={"position_embeddings": rotary},
        iters=5, batch_size=4,
    )  # fmt: skip
    assert found.summary() == stored.summary()
    for name, weight in found.weights.items():
        assert torch.equal(weight.codes, stored.weights[f"model.layers.0.{name}"].codes), name


def test_tune_block_takes_targets_and_arguments(mlp, inputs):
    """With scale 0 the block gives its input whatever the weights are: no error is left to lower."""
    result = tune_block(mlp, inputs, scheme="W2A16G32", arguments={"scale": 0.0}, iters=2)
    assert result.first_loss == result.best_loss == 0
    shifted = tune_block(mlp, inputs, scheme="W2A16G32", targets=mlp(inputs)[0].detach() + 1, iters=2)
    assert shifted.first_loss > 0.9


def test_tune_block_takes_schemes_by_layer(mlp, inputs):
    result = tune_block(mlp, inputs, layer_schemes={"up": 16, "down": {"bits": 8, "group_size": 64}}, iters=2)
    assert {name: (w.scheme.bits, w.scheme.group_size) for name, w in result.weights.items()} == {
        "down.weight": (8, 64)
    }


def test_tune_block_fits_groups_to_narrow_layers(mlp, inputs):
    result = tune_block(mlp, inputs, scheme="W4A16", iters=1)
    assert {name: w.scheme.group_size for name, w in result.weights.items()} == {"up.weight": 64, "down.weight": 128}


def test_tune_block_returns_tuned_norms_and_biases_by_local_name(mlp, inputs):
    result = tune_block(mlp, inputs, scheme="W2A16G32", iters=5, enable_norm_bias_tuning=True)
    assert set(result.plain) == {"norm.weight", "norm.bias", "up.bias"}


def test_tune_block_names_what_it_does_not_know(mlp, inputs):
    with pytest.raises(ConfigError, match="does not know iter"):
        tune_block(mlp, inputs, iter=3)
    with pytest.raises(ConfigError, match=r"layer_schemes names gate\. Layers: up, down"):
        tune_block(mlp, inputs, layer_schemes={"gate": 8})


def test_searched_rounding_is_what_tune_block_does_without_steps(mlp, inputs, monkeypatch):
    called = []
    original = SearchedRounding.__call__
    monkeypatch.setattr(SearchedRounding, "__call__", lambda *args: called.append(1) or original(*args))
    tune_block(mlp, inputs, iters=0)
    assert called == [1]
