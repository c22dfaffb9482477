"""Rounding without the model against the normal path: same tensors, same bytes, same config."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vision_families import FAMILIES

from auto_round import AutoRound, model_free, pipeline
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError, VerificationError
from auto_round.formats.export import HEAD_BLOCK
from auto_round.model_free import RoundedAgain, Rounding, in_order
from auto_round.session import open_session

PLAIN = {"report": False, "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
KINDS = ("llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "gpt2", "opt")
CASES = {
    "auto_round": {"bits": 4, "group_size": 32},
    "auto_gptq": {"bits": 8, "group_size": 32},
    "auto_awq": {"bits": 4, "group_size": 32, "sym": False},
    "llm_compressor": {"scheme": "MXFP4"},
    "auto_round:llm_compressor": {"scheme": "MXFP8"},
}
MORE_FOR_LLAMA = [
    ("llm_compressor", {"bits": 4, "group_size": 32}),
    ("llm_compressor", {"scheme": "FP8_DYNAMIC"}),
    ("llm_compressor", {"scheme": "NVFP4A16"}),
    ("mlx", {"bits": 3, "group_size": 32, "sym": False}),
    ("fake", {"bits": 2, "group_size": 32}),
    ("auto_round", {"bits": 4, "group_size": 32, "quant_lm_head": True, "model_dtype": "fp16"}),
    ("auto_round", {"bits": 4, "group_size": 32, "layer_config": {"down_proj": 8}, "fp_layers": "layers.0"}),
    ("auto_round", {"bits": 4, "group_size": 32, "max_shard_size": "20KB"}),
]
REFUSED = {("gpt2", "auto_awq"), ("gpt2", "llm_compressor"), ("gpt2", "auto_round:llm_compressor")}
REFUSED |= {(kind, "llm_compressor") for kind in ("gpt_oss", "llama4")}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def bytes_of(tensor: torch.Tensor) -> tuple:
    """Returns dtype, shape and bytes, which are equal only if two tensors are the same to the bit."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def unordered(value):
    """Returns JSON values with lists in order of their text: layers may be named in another order."""
    if isinstance(value, dict):
        return {key: unordered(part) for key, part in value.items()}
    return sorted(map(json.dumps, map(unordered, value))) if isinstance(value, list) else value


def write(model: Path, folder: Path, **options) -> Path:
    """Writes one format through the command's line of work."""
    pipeline.run(open_session(RunConfig.from_options(model=str(model), output_dir=str(folder), **PLAIN, **options)))
    return folder


def check_same(model: Path, folder: Path, *, config: bool = True, **options) -> None:
    """Asserts that both paths write the same."""
    normal = write(model, folder / "normal", **options)
    free = write(model, folder / "free", model_free=True, **options)
    expected, found = tensors_in(normal), tensors_in(free)
    assert found.keys() == expected.keys()
    assert [key for key in found if bytes_of(found[key]) != bytes_of(expected[key])] == []
    if config:
        names = {file.name for file in normal.iterdir() if file.suffix == ".json"} - {"model.safetensors.index.json"}
        assert {file.name for file in free.iterdir() if file.suffix == ".json"} >= names
        for name in names:
            texts = [(place / name).read_text() for place in (free, normal)]
            assert unordered(json.loads(texts[0])) == unordered(json.loads(texts[1]))


@pytest.mark.parametrize("format", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_normal_path(make_model, tmp_path, kind, format):
    make_model(kind).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    if (kind, format) in REFUSED:
        for free in (False, True):
            with pytest.raises(UnsupportedError):
                write(tmp_path / "model", tmp_path / "out", format=format, model_free=free, **CASES[format])
        return
    check_same(tmp_path / "model", tmp_path, format=format, **CASES[format])


@pytest.mark.parametrize(("format", "options"), MORE_FOR_LLAMA, ids=str)
def test_options_and_other_formats_give_the_same_bytes(make_model, tmp_path, format, options):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    check_same(tmp_path / "model", tmp_path, format=format, **options)


def test_a_tied_output_layer_gets_a_weight_of_its_own(make_model, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    check_same(tmp_path / "model", tmp_path, format="auto_round", bits=4, group_size=32, quant_lm_head=True)
    assert "lm_head.qweight" in tensors_in(tmp_path / "free")


def test_experts_that_stay_in_one_tensor_are_written_as_one(make_model, tmp_path):
    make_model("gpt_oss").save_pretrained(tmp_path / "model")
    check_same(tmp_path / "model", tmp_path, format="fake", bits=4, group_size=32)
    assert tensors_in(tmp_path / "free")["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3


def test_searched_scales_are_better_than_plain_ones(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    options = {"model_free": True, "bits": 2, "group_size": 32, "format": "fake", "device": "cpu"}
    errors = {}
    for name, plain in (("plain", True), ("searched", False)):
        config = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / name), "disable_opt_rtn": plain}
        pipeline.run(open_session(RunConfig.from_options(**options, **config)))
        original, found = tensors_in(tmp_path / "model"), tensors_in(tmp_path / name)
        errors[name] = sum(float((original[key] - found[key]).square().sum()) for key in original)
    assert errors["searched"] < 0.9 * errors["plain"]


@pytest.fixture
def unknown_model(make_model, tmp_path) -> Path:
    """Returns a folder of a model whose code nobody has."""
    folder = tmp_path / "unknown"
    make_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"], "auto_map": {"AutoModel": "novel.Novel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "novel.py").write_text("raise RuntimeError('this must not run')\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    extra = {
        "model.layers.2.mlp.up_proj.weight": torch.randn(64, 64),  # beyond num_hidden_layers: predicts more tokens
        "mtp.fc.weight": torch.randn(64, 64),
        "visual.blocks.0.attn.qkv.weight": torch.randn(96, 32),
        "visual.patch_embed.proj.weight": torch.randn(32, 3, 2, 2),
        "model.rotary_emb.inv_freq": torch.randn(8),
    }
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors")
    return folder


def test_a_model_of_unknown_code_is_quantized_where_its_names_say_so(unknown_model, tmp_path, caplog):
    with pytest.raises(ConfigError, match="own model code"):
        write(unknown_model, tmp_path / "normal", format="auto_round")
    with caplog.at_level("INFO"):
        folder = write(unknown_model, tmp_path / "free", format="auto_round", model_free=True, group_size=32)
    found, original = tensors_in(folder), tensors_in(unknown_model)
    layers = {key.removesuffix(".qweight") for key in found if key.endswith(".qweight")}
    kinds = {re.sub(r"\d+", "*", layer) for layer in layers}
    attention = {f"model.layers.*.self_attn.{leaf}_proj" for leaf in "qkvo"}
    assert kinds == attention | {f"model.layers.*.mlp.experts.*.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert len(layers) == 2 * (4 + 4 * 3)
    kept = {key for key in original if key.removesuffix(".weight") not in layers}
    assert all(torch.equal(found[key], original[key]) for key in kept)
    assert {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.up_proj.weight", "mtp.fc.weight"} <= kept
    written = json.loads((folder / "config.json").read_text())
    extra = written["quantization_config"]["extra_config"]
    assert extra["model.layers.0.mlp.gate"] == {"bits": 16}
    assert extra[r"^mtp\..*"] == {"bits": 16}
    assert written["quantization_config"]["block_name_to_quantize"] == "model.layers"
    assert (written["model_type"], written["auto_map"]) == ("novel", {"AutoModel": "novel.Novel"})
    for name in ("novel.py", "tokenizer.json", "generation_config.json"):
        assert (folder / name).read_text() == (unknown_model / name).read_text()
    assert "32 of 33 linear layers in 2 blocks of model.layers" in caplog.text or "quantized" in caplog.text
    assert "all tensors accounted for" in caplog.text


def test_vision_tower_and_lists_are_quantized_when_asked_for(unknown_model, tmp_path):
    options = {"format": "auto_round", "model_free": True, "group_size": 32}
    found = tensors_in(write(unknown_model, tmp_path / "one", quant_nontext_module=True, **options))
    assert {"visual.blocks.0.attn.qkv.qweight", "model.layers.0.self_attn.q_proj.qweight"} <= found.keys()
    found = tensors_in(write(unknown_model, tmp_path / "two", to_quant_block_names="visual.blocks", **options))
    assert {key for key in found if key.endswith(".qweight")} == {"visual.blocks.0.attn.qkv.qweight"}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
@pytest.mark.parametrize("format", ["auto_round", "llm_compressor"])
def test_vision_language_models_load_though_their_code_calls_modules_otherwise(tmp_path, name, format):
    family = FAMILIES[name]
    family.model().save_pretrained(tmp_path / "model")
    kind, logits = getattr(transformers, family.architecture), []
    for free in (False, True):
        folder = write(tmp_path / "model", tmp_path / str(free), format=format, model_free=free, group_size=32)
        loaded = kind.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=family.text(2, 8)).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_vl_moe"])
def test_vision_language_models_give_the_same_bytes(tmp_path, name):
    FAMILIES[name].model().save_pretrained(tmp_path / "model")
    check_same(tmp_path / "model", tmp_path, config=False, format="auto_round", bits=4, group_size=32)


def test_experts_fused_in_an_unknown_way_stay_and_are_told(make_model, tmp_path, caplog):
    make_model("granitemoe").save_pretrained(tmp_path / "model")
    folder = write(tmp_path / "model", tmp_path / "out", format="auto_round", model_free=True, group_size=32)
    key = "model.layers.0.block_sparse_moe.input_linear.weight"
    assert torch.equal(tensors_in(folder)[key], tensors_in(tmp_path / "model")[key])
    assert "4 tensors hold experts in a way that names do not tell" in caplog.text


def test_a_quantized_source_is_dequantized_as_it_is_read(make_model, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    write(tmp_path / "model", tmp_path / "eight", format="auto_round", bits=8, group_size=32)
    check_same(tmp_path / "eight", tmp_path, format="auto_round", bits=4, group_size=32)


def test_the_result_loads_and_generates(make_model, token_ids, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    AutoRound(str(tmp_path / "model"), model_free=True, group_size=32).quantize_and_save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_several_formats_come_from_one_pass(make_model, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    rounded = []
    plain = model_free.round_plain
    monkeypatch.setattr(model_free, "round_plain", lambda *args: rounded.append(1) or plain(*args))
    write(tmp_path / "model", tmp_path / "out", format="auto_round,fake", model_free=True, verify=False, group_size=32)
    assert len(rounded) == 2 * 7
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"auto-round", "fake"}


def test_a_wrong_checkpoint_does_not_pass(make_model, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "model")
    close = model_free.OpenExport.close

    def damaged(self, tokenizer):
        close(self, tokenizer)
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.down_proj.qweight"][0, 0] += 1
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(model_free.OpenExport, "close", damaged)
    with pytest.raises(VerificationError, match="down_proj: codes read back differently"):
        write(tmp_path / "model", tmp_path / "out", format="auto_round", model_free=True, group_size=32)
    write(tmp_path / "model", tmp_path / "out", format="auto_round", model_free=True, group_size=32, verify=False)


def test_what_needs_the_model_or_text_is_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"model_free cannot write gguf:q4_0.*It writes .*auto_round"):
        write(tmp_path / "model", tmp_path / "out", format="gguf:q4_0", model_free=True)
    for options in ({"scheme": "FP8_STATIC"}, {"scheme": "NVFP4"}, {"static_kv_dtype": "fp8"}):
        with pytest.raises(ConfigError, match="no calibration text"):
            write(tmp_path / "model", tmp_path / "out", format="llm_compressor", model_free=True, **options)
    with pytest.raises(ConfigError, match="rounds without tuning, but iters=200"):
        RunConfig.from_options(model="x", model_free=True, iters=200)
    with pytest.raises(ConfigError, match="folder or hub name"):
        open_session(RunConfig.from_options(model=make_model(), model_free=True))
    with pytest.raises(UnsupportedError, match=r"'model.blocks' is no list of layers.*Lists: model.layers"):
        write(tmp_path / "model", tmp_path / "out", to_quant_block_names="model.blocks", model_free=True)


def test_weights_are_rounded_anew_for_the_check(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    session = open_session(RunConfig.from_options(model=str(tmp_path / "model"), model_free=True, quant_lm_head=True))
    rounding = Rounding(session.plan, session.source, session.config)
    store = RoundedAgain(session.plan, rounding)
    assert store.finished() == ["model.layers.0", "model.layers.1", HEAD_BLOCK]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(store.load("model.layers.1").weights[name].codes, rounding[name].codes)
    assert (store.plain(HEAD_BLOCK), store.cache_scales(HEAD_BLOCK)) == ({}, {})
    assert len(rounding) == len(list(rounding)) == 15


def test_results_come_in_order_and_few_are_made_ahead():
    made, taken, lock = set(), [], threading.Lock()

    def make(number: int) -> int:
        with lock:
            made.add(number)
            assert len(made) - len(taken) <= 2 + 2 + 1
        return number

    with ThreadPoolExecutor(2) as pool:
        for number in in_order(pool, make, range(40), ahead=2):
            taken.append(number)
    assert taken == list(range(40))


def test_an_error_in_a_thread_reaches_the_caller():
    def fail(number: int) -> int:
        if number == 3:
            raise ConfigError("three")
        return number

    with ThreadPoolExecutor(2) as pool, pytest.raises(ConfigError, match="three"):
        list(in_order(pool, fail, range(10)))


def test_torch_has_its_threads_again_afterwards(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write(tmp_path / "model", tmp_path / "out", format="auto_round", model_free=True, group_size=32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
