import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.inference.config import read_config
from auto_round.models import discover
from auto_round.plan import resolve

AWQ = EXPORTERS["auto_awq"]
PLANS = {
    "sym": {"sym": True},
    "asym": {"sym": False},
    "both": {"layer_config": {"down_proj": {"sym": False}}},
    "some-16": {"sym": False, "fp_layers": "down_proj,layers.1.self_attn"},
    "per-row": {"group_size": -1},
    "base-16": {"bits": 16, "layer_config": {"mlp": {"bits": 4}}},
}


@pytest.fixture
def make_plan(make_model):
    def make(kind="llama", **options):
        config = RunConfig.from_options(**{"group_size": 32, "bits": 4, **options})
        return resolve(discover(make_model(kind)), config.scheme), config

    return make


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_the_config_tells_which_layers_are_quantized(options, make_plan):
    plan, config = make_plan(**options)
    assert AWQ.refusals(plan) == []
    values = json.loads(json.dumps(AWQ.quantization_config(plan, config)))
    assert values["zero_point"] is any(not entry.scheme.sym for entry in plan.quantized().values())
    assert values["sym"] is not values["zero_point"]
    written = read_config(values)
    for entry in plan.entries:
        found = written.resolve(entry.layer.name)
        assert (found is not None) == entry.scheme.is_quantized, entry.layer.name
        if found is not None:
            assert (found[0].bits, found[0].group_size, found[1]) == (4, entry.scheme.group_size, "awq")


@pytest.mark.parametrize("name", PLANS)
def test_transformers_with_this_package_computes_what_dequantized_weights_do(export_model, token_ids, name):
    exported = export_model("auto_awq", **{"bits": 4, **PLANS[name]})
    model = AutoModelForCausalLM.from_pretrained(
        exported.folder, dtype=torch.float32, quantization_config=AutoRoundConfig()
    ).eval()
    ids = token_ids(2, 8)
    with torch.no_grad():
        # Float32 throughout; only the order of sums may differ.
        torch.testing.assert_close(model(ids).logits, exported.dequantized_model()(ids).logits, rtol=0, atol=1e-4)


def test_layers_in_16_bits_are_named_for_each_engine(make_plan):
    plan, config = make_plan(fp_layers="layers.1.self_attn", kind="qwen3_moe")
    written = AWQ.quantization_config(plan, config)
    attention = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"]
    others = [f"model.layers.{block}.mlp.{part}" for block in (0, 1) for part in ("experts", "gate")]
    assert set(written["modules_to_not_convert"]) == {*attention, *others, "lm_head"}
    assert rf"-:{attention[0].replace('.', chr(92) + '.')}$" in written["dynamic"]
    assert all(rule.startswith("-:") for rule in written["dynamic"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bits": 8}, ["bits=8 (only 4) for 14 layers", "Use --bits 4"]),
        ({"layer_config": {"down_proj": 8}}, ["bits=8 (only 4) for 2 layers", "bits=4 with --layer_config"]),
        ({"layer_config": {"down_proj": {"group_size": 64}}}, ["in group_size: group_size=32 (12 layers", "Give all"]),
        ({"quant_lm_head": True}, ["a quantized output layer", "Leave out --quant_lm_head"]),
        ({"group_size": 16}, ["group_size=16 (only 32, 64, 128", "Use --group_size 32"]),
    ],
    ids=["w8", "some-8", "two-groups", "head", "small-group"],
)  # fmt: skip
def test_what_awq_cannot_hold_is_refused_with_what_it_can(options, parts, make_plan):
    (reason,) = AWQ.refusals(make_plan(**options)[0])
    assert all(part in reason for part in parts)
