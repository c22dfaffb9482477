import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.inference.config import read_config
from auto_round.models import discover
from auto_round.plan import resolve

GPTQ = EXPORTERS["auto_gptq"]
MIXED = {"down_proj": 8, "layers.0.self_attn": 16, "up_proj": {"bits": 2, "sym": False}}
PLANS = {
    "w4": {"bits": 4},
    "w2-asym": {"bits": 2, "sym": False},
    "w3": {"bits": 3},
    "w3-asym": {"bits": 3, "sym": False},
    "w8-asym": {"bits": 8, "sym": False},
    "per-row": {"bits": 4, "group_size": -1},
    "mixed": {"bits": 4, "layer_config": MIXED},
    "mixed-asym": {"bits": 4, "sym": False, "layer_config": {"down_proj": {"bits": 8, "sym": True}}},
    "some-16": {"bits": 4, "fp_layers": "down_proj"},
    "head": {"bits": 4, "quant_lm_head": True},
    "other-head": {"bits": 4, "layer_config": {"lm_head": 8}},
    "base-16": {"bits": 16, "layer_config": {"mlp": 4}},
}


@pytest.fixture
def make_plan(make_model):
    """Returns make(kind, **options) -> plan and config of a tiny model."""

    def make(kind="llama", **options):
        config = RunConfig.from_options(**{"group_size": 32, **options})
        return resolve(discover(make_model(kind)), config.scheme), config

    return make


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_the_config_tells_the_scheme_of_each_layer(options, make_plan):
    """Read back by the loader of this package, which follows vLLM's rules."""
    plan, config = make_plan(**options)
    assert GPTQ.refusals(plan) == []
    written = read_config(json.loads(json.dumps(GPTQ.quantization_config(plan, config))))
    for entry in plan.entries:
        found = written.resolve(entry.layer.name)
        if not entry.scheme.is_quantized:
            assert found is None
            continue
        scheme, layout = found
        assert (scheme.bits, scheme.group_size, scheme.sym) == (
            entry.scheme.bits, entry.scheme.group_size, entry.scheme.sym,
        )  # fmt: skip
        assert layout == GPTQ.layout_for(entry.scheme, plan).name


@pytest.mark.parametrize("name", PLANS)
def test_transformers_with_this_package_computes_what_dequantized_weights_do(export_model, token_ids, name):
    exported = export_model("auto_gptq", **PLANS[name])
    model = AutoModelForCausalLM.from_pretrained(
        exported.folder, dtype=torch.float32, quantization_config=AutoRoundConfig()
    ).eval()
    ids = token_ids(2, 8)
    with torch.no_grad():
        # Float32 throughout; only the order of sums may differ.
        torch.testing.assert_close(model(ids).logits, exported.dequantized_model()(ids).logits, rtol=0, atol=1e-4)


def test_symmetric_checkpoints_have_the_keys_that_everyone_reads(make_plan):
    plan, config = make_plan(bits=4)
    written = GPTQ.quantization_config(plan, config)
    assert {key: written[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False,
    }  # fmt: skip
    # Transformers refuses a dataset that it does not know, and this package's loader a `meta`.
    assert not {"dataset", "meta", "checkpoint_format", "dynamic", "modules_in_block_to_quantize"} & set(written)


@pytest.mark.parametrize(
    ("options", "form", "stored"),
    [
        ({"sym": True}, None, 7),
        ({"sym": False}, "gptq_v2", 8),
        ({"sym": True, "layer_config": {"down_proj": {"sym": False}}}, None, 7),
        ({"sym": False, "layer_config": {"down_proj": {"sym": True}}}, "gptq_v2", 8),
    ],
    ids=["sym", "asym", "sym-with-asym", "asym-with-sym"],
)
def test_zero_points_are_stored_as_the_config_says(options, form, stored, export_model):
    """GPTQModel refuses sym=false unless zero points are stored as they are; all others expect minus one."""
    exported = export_model("auto_gptq", bits=4, **options)
    config = json.loads((exported.folder / "quantize_config.json").read_text())
    assert config.get("checkpoint_format") == form
    tensors = load_file(exported.folder / "model.safetensors")
    for name, weight in exported.weights.items():
        words = tensors[name.replace(".weight", ".qzeros")]
        first = (words[0, 0] & 15).item()
        assert first == int(weight.zero_points()[0, 0]) - (8 - stored)


def test_groups_are_numbered_along_the_input(export_model):
    exported = export_model("auto_gptq", bits=4, layer_config={"o_proj": {"group_size": -1}})
    tensors = load_file(exported.folder / "model.safetensors")
    index = tensors["model.layers.0.mlp.down_proj.g_idx"]
    assert (index.dtype, index.tolist()) == (torch.int32, [number // 32 for number in range(128)])
    assert tensors["model.layers.0.self_attn.o_proj.g_idx"].tolist() == [0] * 64


def test_blocks_that_optimum_does_not_find_are_named(make_plan):
    for kind, name in (("llama", None), ("opt", None), ("gpt2", None)):
        plan, config = make_plan(kind)
        assert GPTQ.quantization_config(plan, config).get("block_name_to_quantize") == name


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bits": 4}, []),
        ({"bits": 8, "fp_layers": "down_proj"}, []),
        ({"bits": 4, "sym": False}, ["Use --format auto_awq"]),
        ({"bits": 3}, ["Use --format auto_round"]),
        ({"bits": 4, "layer_config": {"down_proj": 8}}, ["Transformers cannot load this"]),
        ({"bits": 4, "quant_lm_head": True}, ["would leave it random"]),
    ],
    ids=["w4", "some-16", "w4-asym", "w3", "mixed", "head"],
)
def test_engines_that_cannot_load_a_plan_are_named(options, parts, make_plan):
    found = GPTQ.warnings(make_plan(**options)[0])
    assert len(found) == len(parts)
    assert all(part in text for part, text in zip(parts, found, strict=True))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_gptqmodel_packs_in_another_way_are_refused(bits, make_plan):
    """GPTQModel spreads 5, 6 and 7 bits over bit planes: it would load such a checkpoint and compute nonsense."""
    (reason,) = GPTQ.refusals(make_plan(bits=bits)[0])
    assert f"bits={bits} (only 2, 3, 4, 8)" in reason
    assert f"Use --bits {4 if bits == 5 else 8}" in reason
