"""Every mixture-of-experts family from a tiny random model: quantized, written, reloaded, names as engines know them.

A family joins by a line in MOE of tests/conftest.py and one in NAMES of tests/expert_names.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_names import AWQ, GPTQ, NAMES, PACKED
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round import AutoRound
from auto_round.errors import UnsupportedError

# Families whose experts Transformers does not convert from one by one.
STORED_FUSED = ("granitemoe", "gpt_oss", "llama4")
ROUNDING = {"iters": 0}
ONE_STEP = {"iters": 1}
CASES = {
    "w4 rounded": {"bits": 4, **ROUNDING},
    "w4 tuned": {"bits": 4, **ONE_STEP},
    "w2 tuned, asymmetric": {"bits": 2, "sym": False, **ONE_STEP},
}


@pytest.fixture
def quantize(token_ids, tmp_path):
    """Returns quantize(model or folder, formats, **options) -> the quantizer and the folders, names -> folder."""

    def run(model: Any, formats: str, **options: Any) -> tuple[AutoRound, dict[str, Path]]:
        defaults = {"group_size": 32, "dataset": token_ids(8), "nsamples": 8, "seqlen": 16, "batch_size": 4}
        quantizer = AutoRound(model, device="cpu", **{**defaults, **options})
        target = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        _, folders = quantizer.quantize_and_save(target, format=formats)
        return quantizer, dict(zip(formats.split(","), folders, strict=True))

    return run


@torch.no_grad()
def logits_of(folder: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()(ids).logits


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


def layers_with_experts(kind: str) -> int:
    """Returns how many of a tiny model's two layers have experts."""
    return 1 if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe") else 2


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", NAMES)
def test_a_quantized_family_loads_and_computes_what_its_dequantized_weights_do(
    kind, case, make_model, token_ids, quantize, tmp_path
):
    """Biases are stored in float16, which holds those of bfloat16 models; sums of experts may have another order."""
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    quantizer, folders = quantize(str(tmp_path / "model"), "auto_round,fake", **CASES[case])
    experts = [name for name in quantizer.plan.quantized() if ".experts." in name]
    layers = len({name.split(".experts.")[0] for name in experts})
    assert len(experts) == 4 * 3 * layers
    assert layers == layers_with_experts(kind)
    options = {"quantization_config": AutoRoundConfig(backend="torch")}
    ours, dense = logits_of(folders["auto_round"], token_ids(2), **options), logits_of(folders["fake"], token_ids(2))
    # The plain checkpoint rounds what the codes stand for to bfloat16; its router then may choose other experts.
    assert torch.isfinite(dense).all()
    wanted = dequantized_logits(quantizer, tmp_path / "model", token_ids(2))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def dequantized_logits(quantizer: AutoRound, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits of the original model, its fused experts overwritten by hand with dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    for block in quantizer._store.finished():
        for name, weight in quantizer._store.load(block).weights.items():
            if name in parameters:
                parameters[name].copy_(weight.dequantize())
                continue
            stem, index, leaf, _ = name.rsplit(".", 3)
            module, dense = model.get_submodule(stem), weight.dequantize()
            fused = module.down_proj if leaf in ("down_proj", "w2") else module.gate_up_proj
            kind, half = type(model).__name__, dense.shape[0]
            own = fused[int(index)].T if kind in ("GptOssForCausalLM", "Llama4ForCausalLM") else fused[int(index)]
            if fused is module.down_proj:
                own.copy_(dense)
            elif kind == "GptOssForCausalLM":
                own[int(leaf == "up_proj") :: 2].copy_(dense)
            else:
                own[half:].copy_(dense) if leaf in ("up_proj", "w3") else own[:half].copy_(dense)
    return model(ids).logits


@pytest.mark.parametrize("kind", NAMES)
def test_streamed_equals_in_memory_bit_for_bit(kind, make_model, quantize, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path / "model")
    _, streamed = quantize(str(tmp_path / "model"), "auto_round", bits=4, **ONE_STEP)
    _, in_memory = quantize(model, "auto_round", bits=4, **ONE_STEP)
    theirs, ours = (load_file(folders["auto_round"] / "model.safetensors") for folders in (streamed, in_memory))
    assert theirs.keys() == ours.keys()
    assert [key for key in ours if not torch.equal(theirs[key], ours[key])] == []


@pytest.mark.parametrize("kind", NAMES)
def test_experts_and_routers_have_the_names_that_engines_map(kind, make_model, quantize, tmp_path):
    """Each expert's tensors are written under vLLM's names, and each format's own key lists the router."""
    make_model(kind).save_pretrained(tmp_path / "model")
    compressed = "auto_round:llm_compressor" if kind in STORED_FUSED else "llm_compressor"
    formats = f"auto_round,auto_gptq,auto_awq,{compressed}"
    _, folders = quantize(str(tmp_path / "model"), formats, bits=4, disable_opt_rtn=True, **ROUNDING)
    names, router = NAMES[kind], NAMES[kind].router_name
    written = {
        "auto_round": ("qweight", GPTQ),
        "auto_gptq": ("qweight", GPTQ),
        "auto_awq": ("qweight", AWQ),
        compressed: ("weight_packed", PACKED),
    }
    for name, (part, parts) in written.items():
        keys = keys_of(folders[name])
        assert {f"{names.stem}{leaf}.{part}" for leaf in names.leaves} <= keys
        assert f"{router}.weight" in keys
        assert len([k for k in keys if ".experts." in k and k.endswith(f".{part}")]) == 12 * layers_with_experts(kind)
        inside = [key for key in keys if re.match(r"model\.layers\.\d+\.(?!self_attn|.*norm)", key)]
        assert [key for key in inside if not names.accepts(key, parts)] == []
        if names.shared:
            assert [key for key in keys if f".{names.shared}.up_proj.{part}" in key]
    assert quantization_config(folders["auto_round"])["extra_config"][router] == {"bits": 16}
    assert router in quantization_config(folders["auto_awq"])["modules_to_not_convert"]
    lists = {
        "auto_gptq": [rule for rule in quantization_config(folders["auto_gptq"])["dynamic"] if rule.startswith("-:")],
    }
    if kind not in STORED_FUSED:
        lists["llm_compressor"] = quantization_config(folders["llm_compressor"])["ignore"]
    router_leaf = router.rpartition("model.layers.1.")[2].replace(".", r"\.")
    for rules in lists.values():
        assert [rule for rule in rules if router_leaf in rule]


@pytest.mark.parametrize("kind", STORED_FUSED)
def test_experts_that_transformers_loads_fused_only_are_refused_for_llm_compressor(
    kind, make_model, quantize, tmp_path
):
    """It would load such a checkpoint without an error, and make up the experts."""
    make_model(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"llm_compressor: cannot store experts.*Use --format auto_round"):
        quantize(str(tmp_path / "model"), "llm_compressor", bits=4, **ROUNDING)
    _, folders = quantize(str(tmp_path / "model"), "llm_compressor", bits=4, fp_layers=".experts.", **ROUNDING)
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "model", folders["llm_compressor"]))
    fused = [key for key in before if ".experts." in key or "_linear" in key]
    assert fused
    assert all(torch.equal(before[key], after[key]) for key in fused)


@pytest.mark.parametrize("name", ["auto_round:llm_compressor", "auto_gptq", "auto_awq"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_every_format_loads_here(kind, name, make_model, token_ids, quantize, tmp_path):
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    quantizer, folders = quantize(str(tmp_path / "model"), name, bits=4, disable_opt_rtn=True, **ROUNDING)
    ours = logits_of(folders[name], token_ids(2), quantization_config=AutoRoundConfig(backend="torch"))
    wanted = dequantized_logits(quantizer, tmp_path / "model", token_ids(2))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_may_differ_and_some_stay(kind, make_model, token_ids, quantize, tmp_path):
    """The model of the same class that is loaded next, not quantized, is none the wiser."""
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    mixed = {"layer_config": {"experts.1": 8}, "fp_layers": "layers.0.mlp.experts.2"}
    quantizer, folders = quantize(str(tmp_path / "model"), "auto_round", bits=4, **mixed, **ROUNDING)
    ours = logits_of(folders["auto_round"], token_ids(2), quantization_config=AutoRoundConfig(backend="torch"))
    wanted = dequantized_logits(quantizer, tmp_path / "model", token_ids(2))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "granitemoe"])
def test_fused_experts_that_stay_are_copied_as_they_are(kind, make_model, quantize, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "model")
    _, folders = quantize(str(tmp_path / "model"), "auto_round", bits=4, fp_layers=".experts.", **ROUNDING)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(folders["auto_round"] / "model.safetensors")
    experts = [key for key in before if ".experts." in key or "_linear" in key]
    assert experts
    assert [key for key in experts if not torch.equal(after[key], before[key])] == []


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_loaded_checkpoint_can_be_saved_again(kind, make_model, quantize, tmp_path):
    make_model(kind).bfloat16().save_pretrained(tmp_path / "model")
    _, folders = quantize(str(tmp_path / "model"), "auto_round", bits=4, **ROUNDING)
    loaded = AutoModelForCausalLM.from_pretrained(folders["auto_round"])
    loaded.save_pretrained(tmp_path / "again")
    before = load_file(folders["auto_round"] / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if ".experts." in key and not torch.equal(before[key], after[key])] == []


def test_a_model_in_memory_gets_the_dequantized_experts(make_model, token_ids, quantize):
    model = make_model("qwen3_moe")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    before = fused.detach().clone()
    quantizer, _ = quantize(model, "auto_round", bits=4, **ROUNDING)
    assert quantizer.model is model
    weights = quantizer._store.load("model.layers.0").weights
    assert not torch.equal(fused, before)
    for index in range(4):
        gate, up = (weights[f"model.layers.0.mlp.experts.{index}.{leaf}.weight"] for leaf in ("gate_proj", "up_proj"))
        assert torch.equal(fused[index], torch.cat([gate.dequantize(), up.dequantize()]))


def test_tokens_of_each_expert_are_reported_and_those_without_any_are_named(make_model, quantize, caplog):
    """The router always chooses experts 0 and 2; shown all 128 tokens, experts 1 and 3 get other scales, 0 does not."""
    codes = []
    for every in (False, True):
        model = make_model("qwen3_moe", num_hidden_layers=1)
        model.model.layers[0].mlp.gate.forward = fixed_choice
        with caplog.at_level("INFO"):
            options = {"bits": 2, "calibrate_all_experts": every, "verify": False, **ROUNDING}
            quantizer, _ = quantize(model, "fake", **options)
        result = quantizer._store.load("model.layers.0")
        assert result.expert_tokens == {"model.layers.0.mlp.experts": [128, 0, 128, 0]}
        assert "model.layers.0.mlp.experts.1, model.layers.0.mlp.experts.3" in result.note
        codes.append([result.weights[f"model.layers.0.mlp.experts.{i}.up_proj.weight"].codes for i in range(4)])
    assert "0 to 128 tokens reached an expert" in caplog.text
    assert [torch.equal(one, other) for one, other in zip(*codes, strict=True)] == [True, False, True, False]


def fixed_choice(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = torch.tensor([[0, 2]]).expand(len(hidden), 2)
    return torch.zeros(len(hidden), 4), torch.full((len(hidden), 2), 0.5), chosen
