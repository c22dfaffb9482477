"""Quantized models as sources: what is made of them equals what is made of their dequantized values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from auto_round import pipeline
from auto_round.checkpoint import CheckpointSource, ModuleSource
from auto_round.config import RunConfig
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.session import open_session
from auto_round.sources import open_source

# Format and scheme of a source -> options of the run that wrote it.
WRITTEN = {
    "auto_round W4": {"format": "auto_round", "bits": 4},
    "auto_round W2 asym": {"format": "auto_round", "bits": 2, "sym": False},
    "auto_round W3 with a head": {"format": "auto_round", "bits": 3, "quant_lm_head": True},
    "auto_round W4 asym": {"format": "auto_round", "bits": 4, "sym": False},
    "auto_round mixed": {"format": "auto_round", "bits": 4, "layer_config": {"up_proj": 8, "q_proj": 16}},
    "auto_round:gptqmodel": {"format": "auto_round:gptqmodel", "bits": 8, "sym": False},
    "auto_gptq W4": {"format": "auto_gptq", "bits": 4},
    "auto_gptq W3 asym": {"format": "auto_gptq", "bits": 3, "sym": False},
    "auto_awq": {"format": "auto_awq", "bits": 4, "sym": False},
    "llm_compressor W4": {"format": "llm_compressor", "bits": 4},
    "llm_compressor W3 asym": {"format": "llm_compressor", "bits": 3, "sym": False},
    "llm_compressor mixed": {"format": "llm_compressor", "bits": 4, "layer_config": {"up_proj": "FP8_DYNAMIC"}},
    **{
        f"{name} {scheme}": {"format": name, "scheme": scheme}
        for name in ("llm_compressor", "auto_round")
        for scheme in ("INT8_W8A8", "FP8_DYNAMIC", "FPW8A16", "FP8_BLOCK", "MXFP4A16", "MXFP8", "NVFP4A16")
    },
}
ROUNDED = {"iters": 0, "disable_opt_rtn": True, "device": "cpu", "verify": True}


def quantize(model: Path, folder: Path, **options: Any) -> None:
    """Runs rounding to nearest, the check included."""
    own = {} if "scheme" in options else {"group_size": 32}
    config = RunConfig.from_options(model=model, output_dir=folder, **ROUNDED, **own, **options)
    pipeline.run(open_session(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bytes and say the same of them."""
    left, right = tensors_of(one), tensors_of(other)
    for name in ("config.json", "quantization_config.json"):
        if (one / name).is_file() != (other / name).is_file():
            return False
        if (one / name).is_file() and json.loads((one / name).read_text()) != json.loads((other / name).read_text()):
            return False
    return left.keys() == right.keys() and all(same_bytes(tensor, right[key]) for key, tensor in left.items())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def same_tensors(packed: Path, dense: Path) -> bool:
    """Whether a quantized folder reads as a dense one, in every tensor."""
    source, plain = open_source(packed), CheckpointSource(dense)
    assert source.keys() == plain.keys()
    for key in plain.keys():
        found, wanted = source.read(key), plain.read(key)
        assert (source.outline(key).shape, source.outline(key).dtype) == (wanted.shape, wanted.dtype), key
        assert torch.equal(found, wanted), key
    return True


@pytest.fixture
def sources(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Returns make(kind, format, **options) -> a quantized folder and one with the same weights dequantized."""

    def make(kind: str = "llama", *, format: str, **options: Any) -> tuple[Path, Path]:
        original = tmp_path / "original"
        blocks = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
        sizes = blocks if options.get("scheme") == "FP8_BLOCK" else {}
        make_model(kind, **sizes).to(torch.bfloat16).save_pretrained(original)
        options = {"scale_dtype": "bf16", **options}
        quantize(original, tmp_path / "sources", format=f"{format},fake", **options)
        folder = format.replace(":", "-").replace("_", "-")
        return tmp_path / "sources" / folder, tmp_path / "sources" / "fake"

    return make


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_quantized_model_gives_what_its_dequantized_values_give(kind, sources, tmp_path):
    packed, dense = sources(**WRITTEN[kind])
    assert same_tensors(packed, dense)
    for number, folder in enumerate((packed, dense)):
        quantize(folder, tmp_path / f"again{number}", format="auto_round", bits=3)
    assert same_checkpoint(tmp_path / "again0", tmp_path / "again1")


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "llama4", "gpt_oss", "granitemoe", "gpt2", "opt"])
def test_experts_and_transposed_weights_are_read_as_the_model_holds_them(kind, sources, tmp_path):
    """Experts that were stored one by one for their quantization are fused again where 16-bit loaders want it."""
    packed, dense = sources(kind, format="auto_round", bits=4)
    assert same_weights(packed, dense)
    for name, folder in (("a", packed), ("b", dense)):
        quantize(folder, tmp_path / name, format="auto_round,fake", bits=3)
    for name in ("auto-round", "fake"):
        assert same_checkpoint(tmp_path / "a" / name, tmp_path / "b" / name)


def same_weights(packed: Path, dense: Path) -> bool:
    """Whether a quantized folder gives each module what a dense one gives it, wherever experts are fused."""
    source, plain = open_source(packed), CheckpointSource(dense)
    found, wanted = source.tensors(""), plain.tensors("")
    return found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())


def save_as(folder: Path, target: Path, tensors: dict[str, torch.Tensor], **quantization: Any) -> Path:
    """Writes other tensors with the config of a folder, said to be quantized."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, target / "model.safetensors")
    return target


def test_deepseek_with_fp8_blocks_gives_what_its_dequantized_values_give(make_model, tmp_path):
    """As DeepSeek V3 and R1 are published, the layer of their multi-token prediction included."""
    original = tmp_path / "original"
    make_model("deepseek_v3").to(torch.bfloat16).save_pretrained(original)
    packed, dense = {}, {}
    tensors = tensors_of(original)
    tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    for key, tensor in tensors.items():
        packed[key] = dense[key] = tensor
        if key.startswith("model.layers") and key.endswith("proj.weight"):
            packed[key] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            scale = torch.rand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)) / 50
            packed[f"{key}_scale_inv"] = scale
            dense[key] = _dequantize_fp8_weight(packed[key], scale, [128, 128], torch.float32).bfloat16()
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    check_same(tmp_path, save_as(original, tmp_path / "packed", packed, **method), dense)


def test_gpt_oss_with_mxfp4_blocks_gives_what_its_dequantized_values_give(make_model, tmp_path):
    original = tmp_path / "original"
    make_model("gpt_oss", intermediate_size=64).to(torch.bfloat16).save_pretrained(original)
    packed, dense = {}, {}
    for key, tensor in tensors_of(original).items():
        packed[key] = dense[key] = tensor
        if key.endswith("_proj") and tensor.ndim == 3:
            experts, width, rows = tensor.shape
            del packed[key]
            packed[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
            packed[f"{key}_scales"] = torch.randint(118, 126, (experts, rows, width // 32), dtype=torch.uint8)
            dense[key] = convert_moe_packed_tensors(packed[f"{key}_blocks"], packed[f"{key}_scales"])
    check_same(tmp_path, save_as(original, tmp_path / "packed", packed, quant_method="mxfp4"), dense)


def check_same(tmp_path: Path, packed: Path, dense: dict[str, torch.Tensor]) -> None:
    """Asserts that a quantized folder and its values in 16 bits give the same, packed and dequantized."""
    plain = tmp_path / "dense"
    plain.mkdir()
    save_file(dense, plain / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    assert same_tensors(packed, plain)
    for name, folder in (("a", packed), ("b", plain)):
        quantize(folder, tmp_path / name, format="auto_round,fake", bits=4)
    for format_folder in ("auto-round", "fake"):
        assert same_checkpoint(tmp_path / "a" / format_folder, tmp_path / "b" / format_folder)


STATIC = {
    "auto_round": {"format": "auto_round", "scheme": "FP8_STATIC"},
    "llm_compressor": {"format": "llm_compressor", "scheme": "FP8_STATIC"},
    "NVFP4": {"format": "llm_compressor", "scheme": "NVFP4"},
}


@pytest.mark.parametrize("kind", STATIC)
def test_calibrated_ranges_of_a_source_are_not_carried_over(kind, sources, token_ids, tmp_path):
    calibration = {"dataset": list(token_ids()), "nsamples": 8, "seqlen": 16}
    packed, dense = sources(**STATIC[kind], **calibration)
    assert any("input" in key for key in tensors_of(packed))
    assert same_tensors(packed, dense)
    file = packed / "model.safetensors"
    cache = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    save_file({**load_file(file), **cache}, file)
    quantize(packed, tmp_path / "again", format="fake", bits=8)
    assert tensors_of(tmp_path / "again").keys() == tensors_of(dense).keys()


def test_no_trace_of_the_old_quantization_is_left(sources, tmp_path):
    packed, _ = sources(format="auto_gptq", bits=4)
    assert (packed / "quantize_config.json").is_file()
    quantize(packed, tmp_path / "again", format="fake", bits=8)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not list((tmp_path / "again").glob("quant*_config.json"))
    assert {t.dtype for t in tensors_of(tmp_path / "again").values()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_that_gptq_tools_added_are_left_out(value, sources):
    """AutoGPTQ stores one beside each weight, of zeros where the model has none."""
    packed, dense = sources(format="auto_gptq", bits=4)
    file = packed / "model.safetensors"
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file({**load_file(file), bias: torch.full((128,), value)}, file)
    source = open_source(packed)
    if value:  # it belongs to the model, whose class does not know it
        assert source.ignored() == {bias}
    else:
        assert same_tensors(packed, dense)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_unknown_method_is_refused_by_name(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedError, match=r"quantized with hqq, which is not read.*compressed-tensors"):
        open_source(tmp_path)


def test_a_model_that_was_loaded_quantized_is_refused(make_model):
    model = make_model()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match=r"in memory is quantized already \(fp8\)"):
        open_source(model)


def test_plain_models_are_opened_as_before(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert type(open_source(model)) is ModuleSource
    assert open_source(tmp_path).keys() == open_source(model).keys()


GOLDEN = {
    "ar_mixed_4_8_16": "tiny-llama-w4g128",
    "ar_w2g32_asym": "tiny-llama-w2g32",
    "ar_w3g128_sym": "tiny-llama-w3g128",
    "ar_w4g128_asym": "tiny-llama-w4g128",
    "ar_w4g128_sym": "tiny-llama-w4g128",
    "awq_w4g128_asym": "tiny-llama-w4g128",
    "gptq_w3g128_sym": "tiny-llama-w3g128",
    "gptq_w4g128_sym": "tiny-llama-w4g128",
    "llmc_int8_w8a8": "tiny-llama-w8a8",
    "llmc_nvfp4": "tiny-llama-nvfp-w4g16",
    "llmc_w4a16": "tiny-llama-w4g128",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_checkpoints_of_other_tools_are_near_the_model_that_they_were_made_from(name, shared):
    """Every weight of the original is there; quantized ones differ by rounding only, a wrong unpacking by much."""
    source = open_source(shared / "golden" / name / GOLDEN[name])
    original = CheckpointSource(shared / "golden" / "tiny-llama")
    assert source.keys() == original.keys()
    for key in original.keys():
        wanted, found = original.read(key).float(), source.read(key).float()
        error = (found - wanted).norm() / wanted.norm()
        assert error < (0.6 if "w2" in name or "mixed" in name else 0.3), key
