import json

import pytest

from auto_round.config import RunConfig
from auto_round.formats import EXPORTERS
from auto_round.models import discover
from auto_round.plan import resolve

MLX = EXPORTERS["mlx"]


@pytest.fixture
def make_plan(make_model):
    def make(kind="llama", model=None, **options):
        config = RunConfig.from_options(**{"group_size": 32, "bits": 4, **options})
        return resolve(discover(make_model(kind, **(model or {}))), config.scheme), config

    return make


def test_one_scheme_is_told_once_and_what_stays_by_name(make_plan):
    plan, config = make_plan(group_size=64)
    assert MLX.quantization_config(plan, config) == {
        "group_size": 64, "bits": 4, "mode": "affine", "lm_head": False, "model.embed_tokens": False,
    }  # fmt: skip


def test_layers_that_differ_are_told_in_full(make_plan):
    plan, config = make_plan(layer_config={"down_proj": {"bits": 6, "group_size": 64}, "layers.1.self_attn.o_proj": 16})
    written = MLX.quantization_config(plan, config)
    assert written["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert written["model.layers.1.self_attn.o_proj"] is False
    assert "model.layers.0.self_attn.o_proj" not in written


def test_a_quantized_output_layer_is_told(make_plan):
    plan, config = make_plan(layer_config={"lm_head": 8})
    assert MLX.quantization_config(plan, config)["lm_head"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    plan, config = make_plan(quant_lm_head=True)
    assert "lm_head" not in MLX.quantization_config(plan, config)


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        ("llama", {"bits": 7}, "bits=7 (only 2, 3, 4, 5, 6, 8)"),
        ("llama", {"group_size": 16}, "group_size=16 (only 32, 64, 128)"),
        ("llama", {"group_size": -1}, "group_size=-1, one scale per row (only 32, 64, 128)"),
        ("gpt2", {}, "weights that the model stores transposed"),
        ("llama", {"bits": 8, "sym": False, "scale_dtype": "bf16"}, "float16 holds it"),
    ],
)
def test_what_mlx_cannot_run_is_refused(kind, options, part, make_plan):
    (reason,) = MLX.refusals(make_plan(kind, **options)[0])
    assert part in reason


def test_what_float16_scales_do_to_a_bfloat16_model_is_told(make_plan):
    (text,) = MLX.warnings(make_plan()[0])
    assert "--scale_dtype bf16" in text
    assert MLX.warnings(make_plan(scale_dtype="bf16")[0]) == []


def test_config_json_holds_the_config_under_both_names_that_are_read(export_model):
    exported = export_model("mlx", bits=4)
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["mode"] == "affine"
