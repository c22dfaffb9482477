import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round import pipeline
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, VerificationError
from auto_round.formats import EXPORTERS, export
from auto_round.formats.export import checked_targets
from auto_round.session import open_session
from auto_round.shards import ShardWriter
from auto_round.store import RunStore
from auto_round.tensors import BlockResult

ROUNDING = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}


class Tokenizer:
    """Stands in for a tokenizer: it leaves a file where it is saved."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def quantized(make_model, tmp_path):
    """Returns make(**options) -> session and store of a tiny model that was rounded."""

    def make(model=None, **options):
        config = RunConfig.from_options(model=model or make_model(), **{**ROUNDING, **options})
        session = open_session(config)
        return session, pipeline.quantize(session, tmp_path / "work")

    return make


def write(session, store, folder, name="auto_round", tokenizer=None):
    export(EXPORTERS[name], folder, session.plan, session.source, store, session.config, tokenizer)
    return load_file(folder / "model.safetensors") if (folder / "model.safetensors").is_file() else None


def test_packed_tensors_take_the_place_of_the_weight_only(quantized, tmp_path):
    session, store = quantized()
    tensors = write(session, store, tmp_path / "out")
    layer = "model.layers.0.mlp.up_proj"
    assert tensors[f"{layer}.qweight"].shape == (64 * 4 // 32, 128)
    assert tensors[f"{layer}.qzeros"].shape == (2, 128 * 4 // 32)
    assert tensors[f"{layer}.scales"].shape == (2, 128)
    assert f"{layer}.weight" not in tensors
    assert torch.equal(tensors["model.norm.weight"], session.source.model.model.norm.weight)


def test_biases_travel_beside_packed_weights(make_model, quantized, tmp_path):
    model = make_model("opt")
    name = "model.decoder.layers.0.fc1"
    model.get_parameter(f"{name}.bias").data.uniform_()
    tensors = write(*quantized(model), tmp_path / "out")
    bias = model.get_parameter(f"{name}.bias")
    assert bias.abs().max() > 0
    assert torch.equal(tensors[f"{name}.bias"], bias.half())
    assert f"{name}.qweight" in tensors


def test_tuned_norms_replace_the_stored_ones(quantized, tmp_path):
    session, store = quantized()
    result, name = store.load("model.layers.1"), "model.layers.1.input_layernorm.weight"
    store.save("model.layers.1", BlockResult(result.weights, {name: torch.full((64,), 2.5)}))
    tensors = write(session, store, tmp_path / "out")
    assert torch.equal(tensors[name], torch.full((64,), 2.5))
    assert torch.equal(tensors[name.replace(".1.", ".0.")], torch.ones(64))


def test_a_file_of_weights_left_from_an_earlier_export_is_removed(quantized, tmp_path):
    session, store = quantized()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(session, store, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "quantization_config.json", "generation_config.json", "notes.txt",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "auto_awq", "mlx"])
def test_a_plain_export_into_the_folder_of_a_packed_one_leaves_no_quantization_config(quantized, tmp_path, name):
    session, store = quantized()
    write(session, store, tmp_path / "out", name)
    write(session, store, tmp_path / "out", "fake")
    assert not {"quantization_config", "quantization"} & set(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert not list((tmp_path / "out").glob("quant*"))


def test_a_warning_of_a_format_is_logged_once_for_a_plan(quantized, tmp_path, caplog):
    session, _ = quantized(bits=3)
    for _ in range(2):
        checked_targets(("auto_gptq", "fake"), tmp_path / "out", session.plan, session.source)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["auto_gptq"]


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "mlx", "fake"])
def test_a_dtype_that_was_asked_for_is_that_of_all_copied_tensors(quantized, tmp_path, name):
    session, store = quantized(model_dtype="bf16", quant_lm_head=True)
    tensors = write(session, store, tmp_path / "out", name)
    assert tensors["model.embed_tokens.weight"].dtype == tensors["model.norm.weight"].dtype == torch.bfloat16
    if name == "fake":
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == tensors["lm_head.weight"].dtype == torch.bfloat16
    else:
        assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == tensors["lm_head.scales"].dtype == torch.float16


def test_the_config_of_a_model_in_memory_names_its_class(quantized, tmp_path):
    session, store = quantized()
    write(session, store, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "auto-round"


def test_the_config_of_a_folder_keeps_every_field(make_model, quantized, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = {**json.loads(file.read_text()), "a_field_nobody_knows": [1, {"x": None}]}
    file.write_text(json.dumps(config))
    write(*quantized(str(tmp_path / "model")), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    written.pop("quantization_config")
    assert written == config


def test_a_tokenizer_is_saved_beside_a_model_in_memory(quantized, tmp_path):
    session, store = quantized()
    write(session, store, tmp_path / "with", tokenizer=Tokenizer())
    write(session, store, tmp_path / "without")
    assert (tmp_path / "with" / "tokenizer.json").is_file()
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_the_files_of_a_folder_win_over_a_tokenizer(make_model, quantized, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"own": 1}')
    session, store = quantized(str(tmp_path / "model"))
    write(session, store, tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"own": 1}'


def test_original_weights_are_never_overwritten(make_model, quantized, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    session, store = quantized(str(tmp_path / "model"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(ConfigError, match="holds the original model"):
        write(session, store, tmp_path / "model" / ".." / "model")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}


def test_all_formats_are_written_from_one_store(quantized, tmp_path):
    session, store = quantized(sym=False)
    names = [name for name in EXPORTERS if EXPORTERS[name].refusals(session.plan) == []]
    assert {"auto_gptq", "auto_awq", "mlx"} <= set(names)
    assert {"auto_round", "auto_round:auto_awq", "auto_round:auto_gptq", "auto_round:gptqmodel", "fake"} <= set(names)
    scales = []
    for number, name in enumerate(names):
        tensors = write(session, store, tmp_path / str(number), name)
        layer = "model.layers.0.self_attn.q_proj"
        if f"{layer}.scales" in tensors:
            found = tensors[f"{layer}.scales"]
            scales.append(found.t() if name == "mlx" else found)
        elif f"{layer}.weight_scale" in tensors:
            scales.append(tensors[f"{layer}.weight_scale"].t())
    assert len(scales) == len(names) - 2  # all but fake and qdq
    assert all(torch.equal(scales[0], other) for other in scales)
    assert list(RunStore.existing(tmp_path / "work").finished()) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx", "fake"])
def test_layers_that_the_model_does_not_know_are_carried_over_and_said_to_be_in_16_bits(
    name, make_model, tmp_path, caplog
):
    """DeepSeek V3 and GLM-4-MoE store a layer for multi-token prediction behind the last one."""
    original, folder = tmp_path / "original", tmp_path / "out"
    make_model("deepseek_v3").bfloat16().save_pretrained(original)
    file = original / "model.safetensors"
    layer = "model.layers.2"
    extra = {
        f"{layer}.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        f"{layer}.enorm.weight": torch.randn(64).bfloat16(),
        f"{layer}.mlp.experts.0.up_proj.weight": torch.randn(32, 64).bfloat16(),
        "mtp.fc.weight": torch.randn(64, 128).bfloat16(),
    }
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    options = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu", "bits": 4}
    config = RunConfig.from_options(model=str(original), output_dir=str(folder), format=name, **options)
    with caplog.at_level("INFO"):
        session = open_session(config)
        pipeline.run(session)
    assert session.plan.structure.extra_modules == (layer, "mtp")
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in extra.items())
    assert "carried over 3: model.layers.2.eh_proj.weight" in caplog.text
    assert "carried over 3 that the model does not know: model.layers.2.eh_proj.weight" in caplog.text
    said = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    expressions = {
        "auto_round": [key for key in said.get("extra_config", ()) if key.startswith("^")],
        "auto_gptq": [key.removeprefix("-:") for key in said.get("dynamic", ()) if "layers" in key],
        "llm_compressor": [key.removeprefix("re:") for key in said.get("ignore", ()) if key.startswith("re:")],
    }
    if name in expressions:
        assert any(re.match(key, f"{layer}.mlp.experts.0.up_proj") for key in expressions[name])
        assert not any(re.match(key, "model.layers.1.self_attn.o_proj") for key in expressions[name])
    if name == "auto_awq":
        assert layer in said["modules_to_not_convert"]


def test_an_extra_matrix_that_is_lost_fails_the_check(make_model, tmp_path, monkeypatch):
    original = tmp_path / "original"
    make_model("llama").save_pretrained(original)
    file = original / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.ones(8, 8)}, file, metadata={"format": "pt"})
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda self, key, t: None if key == "mtp.fc.weight" else add(self, key, t))
    options = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "device": "cpu"}
    config = RunConfig.from_options(model=str(original), output_dir=str(tmp_path / "out"), **options)
    with pytest.raises(VerificationError, match=r"missing: mtp\.fc\.weight"):
        pipeline.run(open_session(config))
