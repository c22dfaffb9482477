"""Engines that others wrote load what is exported and compute what the dequantized weights do.

Each is an optional package: install gptqmodel and optimum, or mlx, mlx-cpu and mlx-lm, to run these. GPTQModel's
kernels take bfloat16 or float16 only. The logits here reach 5; the unquantized model in bfloat16 is off by 0.07 from
float32, and a wrong layout, zero point or rule by 1 or more.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

BFLOAT16 = 0.2
SIZE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
MIXED = {"down_proj": 8, "layers.1.self_attn": 16, "layers.0.mlp.up_proj": {"bits": 2, "sym": False}}
# What GPTQModel loads by itself; "optimum" marks what Transformers loads through optimum too, which knows one scheme.
GPTQ = {
    "w2": ({"bits": 2}, "optimum"),
    "w2-asym": ({"bits": 2, "sym": False}, "optimum"),
    "w3": ({"bits": 3}, "optimum"),
    "w3-asym": ({"bits": 3, "sym": False}, "optimum"),
    "w4": ({"bits": 4}, "optimum"),
    "w4-asym": ({"bits": 4, "sym": False}, "optimum"),
    "w8": ({"bits": 8}, "optimum"),
    "w8-asym": ({"bits": 8, "sym": False}, "optimum"),
    "per-row": ({"bits": 4, "group_size": -1}, "optimum"),
    "some-16": ({"bits": 4, "fp_layers": "down_proj"}, "optimum"),
    "a-block-16": ({"bits": 4, "fp_layers": "layers.0.mlp"}, "optimum"),
    "mixed": ({"bits": 4, "layer_config": MIXED}, ""),
    "mixed-asym": ({"bits": 4, "sym": False, "layer_config": {"down_proj": {"bits": 8, "sym": True}}}, ""),
    "head": ({"bits": 4, "quant_lm_head": True}, ""),
    "other-head": ({"bits": 4, "layer_config": {"lm_head": 8}}, ""),
    "tied-head": ({"bits": 4, "quant_lm_head": True, "model": {**SIZE, "tie_word_embeddings": True}}, ""),
}
AWQ = {
    "sym": {},
    "asym": {"sym": False},
    "both": {"layer_config": {"down_proj": {"sym": False}}},
    "some-16": {"sym": False, "fp_layers": "layers.1.mlp.down_proj,layers.0.self_attn"},
    "per-row": {"group_size": -1},
}
MLX_MIXED = {"down_proj": 8, "layers.1.self_attn": 16, "layers.0.mlp.up_proj": {"bits": 2, "group_size": 64}}


@pytest.fixture(scope="module")
def ids(token_ids):
    return token_ids(4, 24)


@pytest.fixture
def gptqmodel(monkeypatch):
    """Returns load(folder) -> the model inside GPTQModel's own wrapper, on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    package = pytest.importorskip("gptqmodel")
    return lambda folder: package.GPTQModel.load(str(folder), device="cpu", dtype=torch.bfloat16).model


@pytest.fixture
def through_optimum(monkeypatch):
    """Returns load(folder) -> the model as Transformers loads it with optimum and gptqmodel, without this package."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("optimum.gptq", "gptqmodel"):
        pytest.importorskip(name)
    from transformers import AutoModelForCausalLM

    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")


@pytest.fixture
def mlx(monkeypatch):
    """Returns load(folder) -> the model as mlx-lm loads it, on the CPU."""
    core = pytest.importorskip("mlx.core")
    loading = pytest.importorskip("mlx_lm.utils")
    core.set_default_device(core.cpu)
    return lambda folder: loading.load_model(folder)[0]


def wanted_logits(exported, ids):
    with torch.no_grad():
        return exported.dequantized_model()(ids).logits


def report(found, wanted, record_property):
    """Returns the largest difference; it and the share of equal best tokens go into the report of the run."""
    largest = float((found.float() - wanted).abs().max())
    record_property("largest difference", largest)
    record_property("equal best token", float((found.argmax(-1) == wanted.argmax(-1)).float().mean()))
    return largest


def check_torch(model, exported, ids, record_property):
    with torch.no_grad():
        assert report(model(ids).logits, wanted_logits(exported, ids), record_property) < BFLOAT16
        generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


@pytest.mark.parametrize("name", GPTQ)
def test_gptqmodel_loads_auto_gptq(gptqmodel, export_model, ids, record_property, name):
    exported = export_model("auto_gptq", **{"model": SIZE, **GPTQ[name][0]})
    check_torch(gptqmodel(exported.folder), exported, ids, record_property)


@pytest.mark.parametrize("name", [name for name, (_, engine) in GPTQ.items() if engine])
def test_transformers_with_optimum_loads_auto_gptq(through_optimum, export_model, ids, record_property, name):
    exported = export_model("auto_gptq", **{"model": SIZE, **GPTQ[name][0]})
    check_torch(through_optimum(exported.folder), exported, ids, record_property)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen3", "gemma3"])
def test_gptqmodel_loads_other_families(gptqmodel, export_model, ids, record_property, kind):
    exported = export_model("auto_gptq", kind, bits=4)
    check_torch(gptqmodel(exported.folder), exported, ids, record_property)


@pytest.mark.parametrize("name", AWQ)
def test_gptqmodel_loads_auto_awq(gptqmodel, export_model, ids, record_property, name):
    exported = export_model("auto_awq", **{"model": SIZE, "bits": 4, **AWQ[name]})
    check_torch(gptqmodel(exported.folder), exported, ids, record_property)


@pytest.mark.parametrize("name", AWQ)
def test_transformers_with_gptqmodel_loads_auto_awq(through_optimum, export_model, ids, record_property, name):
    exported = export_model("auto_awq", **{"model": SIZE, "bits": 4, **AWQ[name]})
    check_torch(through_optimum(exported.folder), exported, ids, record_property)


LOAD_ELSEWHERE = """
import sys, torch
from gptqmodel import GPTQModel
ids = torch.load(sys.argv[2])
model = GPTQModel.load(sys.argv[1], device="cpu", dtype=torch.bfloat16).model
with torch.no_grad():
    torch.save(model(ids).logits.float(), sys.argv[3])
"""


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq"])
def test_gptqmodel_loads_mixtures_of_experts_in_16_bits(export_model, ids, tmp_path, record_property, name):
    """In a process of its own: GPTQModel replaces classes of Transformers for such models."""
    pytest.importorskip("gptqmodel")
    exported = export_model(name, "qwen3_moe", bits=4, model=SIZE)
    wanted = wanted_logits(exported, ids)
    files = [str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    torch.save(ids, files[0])
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(exported.folder), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    difference = (torch.load(files[1]) - wanted).abs().amax(-1)
    report(torch.load(files[1]), wanted, record_property)
    # In bfloat16 a router may send a token to another expert, which changes that token and those after it.
    assert float((difference < BFLOAT16).float().mean()) > 0.9


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_lm_loads_mlx(mlx, export_model, ids, record_property, bits, sym):
    check_mlx(mlx, export_model("mlx", bits=bits, sym=sym, group_size=64, model=SIZE), ids, record_property, sym)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_config": MLX_MIXED},
        {"quant_lm_head": True},
        {"layer_config": {"lm_head": 8}},
        {"quant_lm_head": True, "model": {**SIZE, "tie_word_embeddings": True}},
        {"scale_dtype": "bf16"},
        {"model_dtype": "fp16"},
        {"kind": "qwen3"},
    ],
    ids=["mixed", "head", "other-head", "tied-head", "bf16-scales", "fp16-model", "qwen3"],
)
def test_mlx_lm_loads_mixtures_heads_and_dtypes(mlx, export_model, ids, record_property, options):
    exported = export_model("mlx", **{"model": SIZE, "bits": 4, **options})
    check_mlx(mlx, exported, ids, record_property, sym=True)


def check_mlx(load, exported, ids, record_property, sym):
    """Compares in float32: in bfloat16 MLX's kernels for the CPU add up in bfloat16, which tells nothing of weights."""
    import mlx.core as core

    model = load(exported.folder)
    model.set_dtype(core.float32)
    found = torch.from_numpy(np.array(model(core.array(ids.numpy()))))
    wanted = wanted_logits(exported, ids)
    # Symmetric weights are the same numbers; the biases of asymmetric ones are rounded to float16, which moves each
    # weight of a group by up to 2**-11 of its zero point, far below a step.
    assert report(found, wanted, record_property) < (1e-3 if sym else 0.05)


@pytest.mark.parametrize(("scale_dtype", "dtype"), [("fp16", "float32"), ("bf16", "bfloat16")])
def test_mlx_computes_a_bfloat16_model_in_the_wider_dtype(mlx, export_model, ids, scale_dtype, dtype):
    """The reason for the warning of the format."""
    exported = export_model("mlx", bits=4, scale_dtype=scale_dtype, model=SIZE)
    import mlx.core as core

    assert str(mlx(exported.folder)(core.array(ids.numpy())).dtype) == f"mlx.core.{dtype}"


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_mlx_lm_loads_auto_awq(mlx, export_model, ids, record_property, sym):
    exported = export_model("auto_awq", bits=4, sym=sym, group_size=64, model=SIZE)
    import mlx.core as core

    logits = mlx(exported.folder)(core.array(ids.numpy()))
    found = torch.from_numpy(np.array(logits.astype(core.float32)))
    assert report(found, wanted_logits(exported, ids), record_property) < BFLOAT16  # mlx-lm makes the model float16
