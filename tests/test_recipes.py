"""Recipes by name and in files: what they may hold, and that those of this repository mean something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auto_round.api import AutoRound
from auto_round.config import RECIPES, RunConfig
from auto_round.errors import ConfigError
from auto_round.plan import SIXTEEN_BIT
from auto_round.recipes import recipe_options, write_recipe
from auto_round.session import open_session

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
# Recipe -> a tiny model of its family. GGUF recipes need a vocabulary: tests/formats/gguf/test_prescribe.py.
FAMILY_OF = {
    "deepseek-r1-int2-mixed": "deepseek_v3",
    "deepseek-r1-int4": "deepseek_v3",
    "moe-int2-mixed": "qwen3_moe",
    "int2-head-tail": "qwen3",
}


def plan_for(name, model):
    return open_session(RunConfig.from_options(model=model, **recipe_options(FOLDER / f"{name}.json"))).plan


def bits_of(plan):
    return {entry.layer.name: entry.scheme.bits for entry in plan.entries}


def test_every_recipe_of_the_repository_has_a_family_and_says_where_it_comes_from():
    files = sorted(FOLDER.glob("*.json"))
    gguf = {file.stem for file in files if recipe_options(file).get("format", "").startswith("gguf:")}
    assert {file.stem for file in files} == set(FAMILY_OF) | gguf
    assert len(gguf) == 2
    for file in files:
        assert len(json.loads(file.read_text(encoding="utf-8"))["comment"]) > 40


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_recipe_of_the_repository_resolves_for_its_family(name, make_model):
    plan = plan_for(name, make_model(FAMILY_OF[name], num_hidden_layers=6))
    assert plan.quantized()
    assert len({entry.scheme for entry in plan.entries if entry.layer.block is not None}) > 1


def test_the_mixed_recipe_of_deepseek_keeps_what_is_no_expert_wider(make_model):
    bits = bits_of(plan_for("deepseek-r1-int2-mixed", make_model("deepseek_v3")))
    assert {n for name, n in bits.items() if ".mlp.experts." in name and "1.mlp.experts.0.down" not in name} == {2, 16}
    assert {bits[f"model.layers.1.mlp.experts.{n}.down_proj"] for n in range(4)} == {16}
    assert {bits[f"model.layers.1.mlp.experts.{n}.up_proj"] for n in range(4)} == {2}
    assert bits["model.layers.1.mlp.shared_experts.up_proj"] == bits["model.layers.0.self_attn.o_proj"] == 4


def test_the_recipe_of_head_and_tail_widens_two_blocks_at_each_end(make_model):
    bits = bits_of(plan_for("int2-head-tail", make_model("qwen3", num_hidden_layers=6)))
    assert [bits[f"model.layers.{n}.mlp.up_proj"] for n in range(6)] == [4, 4, 2, 2, 4, 4]


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_gives_the_options_of_that_name(name):
    assert recipe_options(name) == RECIPES[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"itres": 3}', "unknown option 'itres'. Did you mean 'iters'?"),
        ('{"iters": 3, "nsampels": 4}', "unknown option 'nsampels'. Did you mean 'nsamples'?"),
        ('{"iters": "3"}', "iters='3' (allowed: int)"),
        ('{"iters": true}', "iters=True (allowed: int)"),
        ('{"sym": 1}', "sym=1 (allowed: bool)"),
        ('{"scheme": 4}', "scheme=4 (allowed: text or object or list)"),
        ('{"fp_layers": "a", "ignore_layers": "b"}', "option 'fp_layers' is given twice"),
        ('{"layer_config": "no.json"}', "layer_config 'no.json' is neither"),
        ("[1]", "must be a JSON object"),
        ("{oops", "is not valid JSON"),
    ],
)
def test_a_file_with_anything_wrong_is_refused(content, message, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        recipe_options(file)
    assert message in str(caught.value)


def test_spellings_of_the_command_line_are_taken():
    assert recipe_options({"ignore_layers": "o_proj", "e2e_lr": 1}) == {"fp_layers": "o_proj", "e2e_lr": 1}


def test_what_is_written_is_read_back(tmp_path):
    options = {"scheme": "W2A16G64", "layer_config": {"blocks[0]": {"bits": 4}}, "sym": True}
    write_recipe(tmp_path / "r.json", options, "why")
    assert recipe_options(tmp_path / "r.json") == options
    assert json.loads((tmp_path / "r.json").read_text())["comment"] == "why"


def test_the_api_takes_a_recipe_and_options_beside_it_win(make_model):
    model = make_model("qwen3", num_hidden_layers=6)
    rounder = AutoRound(model, recipe=FOLDER / "int2-head-tail.json", iters=3, device="cpu")
    assert (rounder.config.tune.iters, rounder.config.calib.nsamples) == (3, 512)
    assert rounder.plan.entries[0].scheme.bits == 4
    assert AutoRound(model, recipe="light", device="cpu").config.tune.iters == RECIPES["light"]["iters"]
    assert AutoRound(model, recipe={"fp_layers": "blocks[0]"}, device="cpu").plan.entries[0].scheme == SIXTEEN_BIT
