"""Checkpoints for compressed-tensors: read by its config classes, loaded by Transformers, matched as vLLM matches."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from auto_round import pipeline
from auto_round.config import RunConfig
from auto_round.conversion import unfuse
from auto_round.data_types.activations import quantize_activation
from auto_round.formats import EXPORTERS
from auto_round.formats.llm_compressor import activation_args, compression_format, weight_args
from auto_round.layouts.by_scheme import compressed_layout
from auto_round.models import discover
from auto_round.plan import Plan, resolve
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.session import open_session
from auto_round.tensors import QuantizedTensor

FORMAT = EXPORTERS["llm_compressor"]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole groups of 128
PER_TENSOR = {"act_group_size": 0, "act_dynamic": False}
# Names of our presets -> those of compressed-tensors.
SAME_PRESETS = {
    "W2A16": "W2A16", "W3A16": "W3A16", "W4A16": "W4A16", "W5A16": "W5A16", "W8A16": "W8A16", "W4A8": "W4A8",
    "INT8_W8A8": "INT8", "FP8_DYNAMIC": "FP8_DYNAMIC", "FP8_BLOCK": "FP8_BLOCK", "MXFP4": "MXFP4", "MXFP8": "MXFP8",
    "MXFP4A16": "MXFP4A16", "NVFP4": "NVFP4", "NVFP4A16": "NVFP4A16",
}  # fmt: skip
FORMATS = {
    "W4A16": "pack-quantized", "W4A8": "pack-quantized", "INT8_W8A8": "int-quantized", "FPW8A16": "naive-quantized",
    "FP8_STATIC": "float-quantized", "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized",
    "MXFP4": "mxfp4-pack-quantized", "MXFP8": "mxfp8-quantized", "NVFP4": "nvfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
}  # fmt: skip


@pytest.fixture
def make_plan(make_model):
    """Returns make(kind, model={...}, **options) -> plan and config of a tiny model."""

    def make(kind: str = "llama", *, model: dict[str, Any] | None = None, **options: Any):
        config = RunConfig.from_options(**options)
        return resolve(discover(make_model(kind, **(WIDE if model is None else model))), config.scheme), config

    return make


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint, the model that it was made from, and what was put into it."""

    folder: Path
    source: Path
    plan: Plan
    weights: dict[str, QuantizedTensor]

    def expected(self, dtype: torch.dtype) -> Any:
        """Returns the model with dequantized weights and quantized activations of our own."""
        model = unfuse(AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype).eval()).model
        for entry in self.plan.quantized().values():
            weight, module = self.weights[entry.layer.parameter], model.get_submodule(entry.layer.name)
            module.weight = torch.nn.Parameter(weight.dequantize(dtype))  # of its own, if it was tied
            if entry.scheme.activation is not None:
                activation, peak = entry.scheme.activation, weight.input_peak
                module.register_forward_pre_hook(
                    lambda _module, args, a=activation, p=peak: (quantize_activation(args[0], a, p), *args[1:])
                )
        return model


@pytest.fixture
def write(make_model, token_ids, tmp_path):
    """Returns write(kind, model={...}, **options) -> a checkpoint of a tiny bfloat16 model, rounded to nearest."""

    def make(kind: str = "llama", *, model: dict[str, Any] | None = None, **options: Any) -> Written:
        source, folder, work = tmp_path / "source", tmp_path / "written", tmp_path / "work"
        make_model(kind, **(WIDE if model is None else model)).to(torch.bfloat16).save_pretrained(source)
        chosen = {
            "format": "llm_compressor", "iters": 0, "disable_opt_rtn": True, "device": "cpu", "nsamples": 8,
            "seqlen": 16, "batch_size": 4, "dataset": [row[None] for row in token_ids()], **options,
        }  # fmt: skip
        config = RunConfig.from_options(model=str(source), output_dir=str(folder), work_dir=str(work), **chosen)
        session = open_session(config)
        pipeline.run(session)
        kept = dataclasses.replace(session, config=dataclasses.replace(session.config, resume=True))
        store = pipeline.quantize(kept, work)
        weights = {name: weight for block in store.finished() for name, weight in store.load(block).weights.items()}
        return Written(folder, source, session.plan, weights)

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    chosen = {"quantization_config": CompressedTensorsConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen).eval()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


# --- what the config says


@pytest.mark.parametrize(("preset", "theirs"), SAME_PRESETS.items())
def test_arguments_are_those_of_the_preset_of_compressed_tensors(preset, theirs):
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme, expected = PRESET_SCHEMES[preset], preset_name_to_scheme(theirs, ["Linear"])
    mine = QuantizationArgs.model_validate(weight_args(scheme))
    assert mine == expected.weights.model_copy(update={"zp_dtype": mine.zp_dtype})
    described = activation_args(scheme.activation)
    assert (described is None) == (expected.input_activations is None)
    if described is not None:
        mine = QuantizationArgs.model_validate(described)
        update = {"zp_dtype": mine.zp_dtype, "observer": mine.observer}
        assert mine == expected.input_activations.model_copy(update=update)


@pytest.mark.parametrize(("preset", "name"), FORMATS.items())
def test_the_compression_format_is_the_one_that_compressed_tensors_takes(preset, name):
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme as TheirScheme

    scheme = PRESET_SCHEMES[preset]
    assert compression_format(scheme) == name
    theirs = TheirScheme(
        targets=["Linear"], weights=weight_args(scheme), input_activations=activation_args(scheme.activation)
    )
    # Weights of 4 bits beside 8-bit activations stay packed here: half the size, and what vLLM's GPU kernel reads.
    expected = "int-quantized" if preset == "W4A8" else name
    assert infer_module_format(torch.nn.Linear, theirs).value == expected


@pytest.mark.parametrize("preset", FORMATS)
def test_the_config_is_read_by_compressed_tensors(preset, make_plan):
    from compressed_tensors.quantization import QuantizationConfig

    plan, config = make_plan(scheme=preset)
    written = json.loads(json.dumps(FORMAT.quantization_config(plan, config)))
    parsed = QuantizationConfig.model_validate(written)
    assert (parsed.format, parsed.quantization_status.value) == (FORMATS[preset], "compressed")
    assert parsed.ignore == ["lm_head"]
    assert parsed.kv_cache_scheme is None
    (group,) = parsed.config_groups.values()
    assert group.targets == ["Linear"]


@pytest.mark.parametrize("golden", ["llmc_w4a16", "llmc_int8_w8a8", "llmc_nvfp4"])
def test_the_config_is_the_references_but_for_defaults(golden, shared, make_plan):
    from compressed_tensors.quantization import QuantizationConfig

    (folder,) = (shared / "golden" / golden).iterdir()
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    preset = {"llmc_w4a16": "W4A16", "llmc_int8_w8a8": "INT8_W8A8", "llmc_nvfp4": "NVFP4"}[golden]
    written = FORMAT.quantization_config(*make_plan(scheme=preset))
    (mine,), (theirs,) = written["config_groups"].values(), stored["config_groups"].values()
    assert mine == {**theirs, "format": stored["format"]}  # the reference leaves some groups without
    assert QuantizationConfig.model_validate(written) == QuantizationConfig.model_validate(
        {**stored, "config_groups": written["config_groups"]}
    )


MIXED = {
    "scheme": "W4A16",
    "layer_config": {"down_proj": "FP8_DYNAMIC", "layers.1.self_attn": "W8A16", "layers.0.mlp.down_proj": 16},
}


def test_mixed_schemes_are_groups_of_names_that_match_nothing_else(make_plan):
    plan, config = make_plan(**MIXED)
    written = FORMAT.quantization_config(plan, config)
    assert written["format"] == "mixed-precision"
    groups = {group["format"] + str(group["weights"]["num_bits"]): group for group in written["config_groups"].values()}
    assert set(groups) == {"pack-quantized4", "pack-quantized8", "float-quantized8"}
    assert groups["float-quantized8"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert groups["pack-quantized8"]["targets"] == [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"]
    assert r"re:model\.layers\.\d+\.mlp\.gate_proj$" in groups["pack-quantized4"]["targets"]
    assert written["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"scheme": "FP8_STATIC"}),
        ("llama", MIXED),
        ("llama", {"scheme": "W4A16", "quant_lm_head": True}),
        ("llama", {"scheme": "W4A16", "layer_config": {"lm_head": "W8A16"}}),
        ("gemma3", {"scheme": "MXFP4", "fp_layers": "layers.2"}),
        ("opt", {"scheme": "INT8_W8A8"}),
        ("qwen3_moe", {"scheme": "NVFP4A16"}),
        ("qwen3_moe", {"scheme": "NVFP4A16", "layer_config": {"o_proj": "MXFP8"}}),
    ],
    ids=["fp8", "mixed", "head", "mixed-head", "gemma", "opt", "moe", "mixed-moe"],
)
def test_compressed_tensors_finds_each_layers_scheme(kind, options, make_plan, make_model):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = {} if kind != "llama" else None
    plan, config = make_plan(kind, model=model, **options)
    parsed = QuantizationConfig.model_validate(FORMAT.quantization_config(plan, config))
    loaded = make_model(kind, **(WIDE if model is None else model))
    apply_quantization_config(loaded, parsed, show_progress=False)
    found = {name: module for name, module in loaded.named_modules() if hasattr(module, "quantization_scheme")}
    assert set(found) == {entry.layer.name for entry in plan.quantized().values()}
    for entry in plan.quantized().values():
        weights = found[entry.layer.name].quantization_scheme.weights
        assert (weights.num_bits, weights.type) == (entry.scheme.bits, weight_args(entry.scheme)["type"])


# --- what vLLM makes of it

VLLM_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOKENS = ("token", "group")


def vllm_scheme(group: dict[str, Any]) -> str | None:
    """Returns the scheme that vLLM runs a config group with, None for an error.

    Source: CompressedTensorsConfig._get_scheme_from_parts and is_activation_quantization_format in vllm-project/vllm,
    vllm/model_executor/layers/quantization/compressed_tensors/{compressed_tensors,utils}.py (2026).
    """
    weight, inputs, name = group["weights"], group["input_activations"], group["format"]

    def is_float(args: dict[str, Any] | None, bits: int, strategy: str, size: int) -> bool:
        described = args and (args["type"], args["num_bits"], args["strategy"], args["group_size"], args["symmetric"])
        return described == ("float", bits, strategy, size, True)

    if is_float(weight, 4, "tensor_group", 16):
        return "W4A4Fp4" if inputs is None or is_float(inputs, 4, "tensor_group", 16) else None
    if is_float(weight, 4, "group", 32):
        return "W4A4Mxfp4"
    if is_float(weight, 8, "group", 32) and weight.get("scale_dtype") == "torch.uint8":
        return "W8A8Mxfp8"
    if name == "pack-quantized":
        if weight["type"] != "int" or weight["strategy"] not in ("channel", "group"):
            return None
        if inputs is None:
            return "WNA16"
        fits = inputs["type"] == "int" and inputs["symmetric"] and inputs["dynamic"] and inputs["strategy"] in TOKENS
        return f"WNA{inputs['num_bits']}Int" if fits and inputs["num_bits"] in (4, 8) else None
    if name not in ("naive-quantized", "int-quantized", "float-quantized") or not weight["symmetric"]:
        return None
    if weight["type"] == "float":
        if weight["strategy"] not in ("tensor", "channel", "block"):
            return None
        if inputs is None:
            return "W8A16Fp8"
        static = inputs["strategy"] == "tensor" and inputs["symmetric"] and weight["strategy"] != "block"
        return "W8A8Fp8" if inputs["type"] == "float" and (inputs["dynamic"] or static) else None
    strategy = "token" if inputs["dynamic"] else "tensor"
    fits = weight["strategy"] in ("tensor", "channel") and weight["num_bits"] == inputs["num_bits"] == 8
    return "W8A8Int8" if fits and inputs["strategy"] == strategy else None


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("W2A16", "WNA16"), ("W4A16", "WNA16"), ("W8A16", "WNA16"), ("W4A8", "WNA8Int"), ("INT4", "WNA4Int"),
        ("INT8_W8A8", "W8A8Int8"), ("FP8_STATIC", "W8A8Fp8"), ("FP8_DYNAMIC", "W8A8Fp8"), ("FP8_BLOCK", "W8A8Fp8"),
        ("FPW8A16", "W8A16Fp8"), ("MXFP4", "W4A4Mxfp4"), ("MXFP4A16", "W4A4Mxfp4"), ("MXFP8", "W8A8Mxfp8"),
        ("NVFP4", "W4A4Fp4"), ("NVFP4A16", "W4A4Fp4"),
    ],
)  # fmt: skip
def test_vllm_has_a_scheme_for_every_preset(preset, expected, make_plan):
    plan, config = make_plan(scheme=preset)
    assert FORMAT.refusals(plan) == []
    (group,) = FORMAT.quantization_config(plan, config)["config_groups"].values()
    assert vllm_scheme(group) == expected


def test_vllm_has_a_scheme_for_whatever_is_not_refused(make_plan):
    held = 0
    for data_type, bits, group_size, sym in (
        ("int", 4, 32, True), ("int", 8, -1, True), ("int", 8, -1, False), ("fp", 8, -1, True), ("fp", 8, 0, True),
        ("fp", 8, (128, 128), True), ("mx_fp", 4, 32, True), ("mx_fp", 8, 32, True), ("nv_fp", 4, 16, True),
    ):  # fmt: skip
        weight = QuantizationScheme(data_type=data_type, bits=bits, group_size=group_size, sym=sym)
        for act_type, act_bits, act_group, dynamic, act_sym in (
            ("int", 16, None, True, True), ("int", 8, -1, True, True), ("int", 8, -1, True, False),
            ("int", 8, 0, False, True), ("int", 8, 0, True, True), ("int", 8, 32, True, True),
            ("fp", 8, -1, True, True), ("fp", 8, 0, True, True), ("fp", 8, 0, False, True), ("fp", 8, 128, True, True),
            ("mx_fp", 4, 32, True, True), ("mx_fp", 8, 32, True, True), ("nv_fp4_with_static_gs", 4, 16, True, True),
            ("nv_fp", 4, 16, True, True),
        ):  # fmt: skip
            scheme = weight.replace(
                act_data_type=act_type, act_bits=act_bits, act_group_size=act_group, act_dynamic=dynamic,
                act_sym=act_sym,
            )  # fmt: skip
            plan, config = make_plan(scheme=scheme)
            if FORMAT.refusals(plan):
                continue
            held += 1
            (group,) = FORMAT.quantization_config(plan, config)["config_groups"].values()
            assert vllm_scheme(group) is not None, str(scheme)
    assert held >= 20


def vllm_group(config: dict[str, Any], layer: str, kind: str) -> str | None:
    """Returns the config group that vLLM finds for a layer of its own, None for 16 bits.

    Source: should_ignore_layer and find_matched_target in vllm-project/vllm,
    vllm/model_executor/layers/quantization/compressed_tensors/utils.py (2026): names first, then part of the class
    name, then the names of the parts of joined layers, all of which must match.
    """

    def is_named(name: str, target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else name == target

    stem, _, leaf = layer.rpartition(".")
    parts = [f"{stem}.{part}" for part in VLLM_FUSED.get(leaf, (leaf,))]
    skipped = {any(is_named(part, target) for target in config["ignore"]) for part in parts}
    assert len(skipped) == 1, f"{layer}: vLLM refuses, its parts differ"
    if skipped.pop():
        return None
    targets = {target: name for name, group in config["config_groups"].items() for target in group["targets"]}
    for target, name in targets.items():
        if is_named(layer, target):
            return name
    for target, name in targets.items():
        if target.lower() in kind.lower():
            return name
    found = [next((name for target, name in targets.items() if is_named(part, target)), None) for part in parts]
    assert all(found), layer
    return found[0]


def vllm_layers(blocks: int) -> dict[str, str]:
    """Returns the linear layers that vLLM builds for a Llama, name -> class."""
    kinds = {
        "self_attn.qkv_proj": "QKVParallelLinear", "self_attn.o_proj": "RowParallelLinear",
        "mlp.gate_up_proj": "MergedColumnParallelLinear", "mlp.down_proj": "RowParallelLinear",
    }  # fmt: skip
    return {f"model.layers.{index}.{name}": kind for index in range(blocks) for name, kind in kinds.items()}


def test_vllm_finds_the_scheme_of_joined_layers_in_mixed_checkpoints(make_plan):
    plan, options = make_plan(**MIXED)
    config = FORMAT.quantization_config(plan, options)
    schemes = {entry.layer.name: entry.scheme for entry in plan.entries}
    for layer, kind in vllm_layers(2).items():
        stem, _, leaf = layer.rpartition(".")
        scheme = schemes[f"{stem}.{VLLM_FUSED.get(leaf, (leaf,))[0]}"]
        group = vllm_group(config, layer, kind)
        assert (group is None) == (not scheme.is_quantized), layer
        if group is not None:
            assert config["config_groups"][group]["weights"]["num_bits"] == scheme.bits


def test_vllm_leaves_routers_and_experts_alone(make_plan):
    plan, options = make_plan("qwen3_moe", model={}, scheme="MXFP4")
    config = FORMAT.quantization_config(plan, options)
    assert vllm_group(config, "model.layers.0.mlp.gate", "ReplicatedLinear") is None
    assert vllm_group(config, "model.layers.1.mlp.experts", "RoutedExperts") is None
    assert vllm_group(config, "model.layers.1.mlp.experts.0.gate_proj", "RoutedExperts") is None
    assert vllm_group(config, "model.layers.1.self_attn.qkv_proj", "QKVParallelLinear") == "group_0"
    # A class name would reach the experts: vLLM takes "Linear" for them too.
    assert "Linear" not in config["config_groups"]["group_0"]["targets"]


def test_vllm_finds_a_quantized_output_layer_by_its_name(make_plan):
    config = FORMAT.quantization_config(*make_plan(scheme="W4A16", quant_lm_head=True))
    assert vllm_group(config, "lm_head", "ParallelLMHead") == "group_0"
    assert config["ignore"] == []


# --- what is refused


@pytest.mark.parametrize(
    ("options", "reason", "advice"),
    [
        ({"scheme": "MXFP6"}, "data_type=mx_fp bits=6 (only int 2 to 8, fp 8, mx_fp 4, mx_fp 8, nv_fp 4)", "--scheme"),
        ({"scheme": "MXINT4"}, "data_type=mx_int bits=4", "--scheme"),
        ({"data_type": "fp8_e5m2", "bits": 8, "group_size": -1}, "data_type=fp_e5m2 bits=8", "--scheme"),
        ({"scheme": "FPW8A16", "group_size": 32}, "group_size=32 (only -1 per row, 0 per tensor, or blocks)", "or use"),
        ({"bits": 4, "group_size": 0}, "group_size=0", "--scheme"),
        ({"scheme": "FP8_DYNAMIC", "act_group_size": 128}, "fp8 g128 dynamic with fp8 weights", "FP8_DYNAMIC"),
        ({"scheme": "FP8_DYNAMIC", "act_group_size": 0}, "fp8 per tensor dynamic", "FP8_STATIC"),
        ({"scheme": "FP8_BLOCK", "act_group_size": -1}, "fp8 per token dynamic with fp8 weights", "FP8_BLOCK"),
        ({"scheme": "FPW8A16", "act_bits": 8, "act_data_type": "int", "act_group_size": -1}, "int8 per token", "fp8"),
        ({"scheme": "INT8_W8A8", "act_group_size": 0}, "int8 per tensor dynamic", "per tensor static"),
        ({"scheme": "W4A8", "act_group_size": 0, "act_dynamic": False}, "int8 per tensor static", "W4A8"),
        ({"scheme": "W4A8", "act_sym": False}, "with int4 weights", "symmetric"),
        ({"scheme": "MXFP4A16", "act_bits": 8, "act_data_type": "mx_fp"}, "mx_fp8 g32 dynamic with mx_fp4", "MXFP4"),
        ({"scheme": "NVFP4A16", "act_bits": 4}, "nv_fp4 g16 dynamic with nv_fp4", "nv_fp4_with_static_gs"),
    ],
)  # fmt: skip
def test_schemes_that_nothing_holds_are_refused_with_what_does(options, reason, advice, make_plan):
    (text,) = FORMAT.refusals(make_plan(**options)[0])
    assert reason in text
    assert advice in text
    assert "for 14 layers, e.g. model.layers.0.self_attn.q_proj." in text


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("NVFP4", "groups of 16 in 72 inputs (only whole groups)"),
        ("MXFP4", "groups of 32 in 72 inputs (only whole groups)"),
        ("FP8_BLOCK", "blocks of 128 in 72 inputs (only whole blocks)"),
    ],
)
def test_layers_whose_shape_does_not_fit_are_to_be_kept(scheme, reason, make_plan):
    plan, _ = make_plan(model={**WIDE, "intermediate_size": 72}, scheme=scheme)
    (text,) = FORMAT.refusals(plan)
    assert reason in text
    assert "for 2 layers, e.g. model.layers.0.mlp.down_proj. Keep these layers in 16 bits with --fp_layers" in text
    plan, _ = make_plan(model={**WIDE, "intermediate_size": 72}, scheme=scheme, fp_layers="down_proj")
    assert FORMAT.refusals(plan) == []


def test_groups_of_activations_must_be_whole_too(make_plan):
    scheme = PRESET_SCHEMES["W4A8"].replace(group_size=-1, act_group_size=48)
    texts = FORMAT.refusals(make_plan(scheme=scheme)[0])
    assert [re.search(r"activations in groups of 48 for (\d+) inputs", text)[1] for text in texts] == ["128", "256"]


def test_weights_that_are_stored_transposed_are_refused(make_plan):
    texts = FORMAT.refusals(make_plan("gpt2", model={}, scheme="INT8_W8A8")[0])
    assert ["transposed" in text for text in texts] == [True]


def test_every_reason_is_said_at_once(make_plan):
    plan, _ = make_plan(scheme="W4A16", layer_config={"q_proj": "MXFP6", "down_proj": {"group_size": 0}})
    texts = FORMAT.refusals(plan)
    assert len(texts) == 2
    assert "model.layers.0.self_attn.q_proj" in texts[0]
    assert "for 2 layers, e.g. model.layers.0.mlp.down_proj" in texts[1]


@pytest.mark.parametrize("preset", ["W4A16", "W4A8", "INT8_W8A8", "FP8_BLOCK", "MXFP8", "NVFP4"])
def test_nothing_is_refused_that_the_layout_holds(preset, make_plan):
    plan, _ = make_plan(scheme=preset)
    assert FORMAT.refusals(plan) == []
    layout = FORMAT.layout_for(plan.base, plan)
    assert layout is compressed_layout(plan.base)
    assert layout.refuses(plan.base, (128, 128)) is None


# --- what Transformers loads

FLOAT32 = {
    "w2": {"scheme": "W2A16G32"}, "w3": {"scheme": "W3A16"}, "w4": {"scheme": "W4A16"}, "w5": {"scheme": "W5A16"},
    "w6": {"scheme": "W6A16G64"}, "w7": {"scheme": "W7A16"}, "w8": {"scheme": "W8A16"},
    "w4-row": {"bits": 4, "group_size": -1}, "fp8-weights": {"scheme": "FPW8A16"},
    "fp8-static": {"scheme": "FP8_STATIC"}, "fp8-tensor": {"scheme": "FP8_STATIC", "group_size": 0},
    "fp8-dynamic": {"scheme": "FP8_DYNAMIC"}, "fp8-block": {"scheme": "FP8_BLOCK"},
    "int8-static": {"scheme": "INT8_W8A8", **PER_TENSOR}, "mixed": MIXED,
    "head": {"scheme": "W4A16", "quant_lm_head": True},
}  # fmt: skip


def check_same_logits(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Asserts equality up to the order of float32 sums, which padded matrices may change."""
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("name", FLOAT32)
def test_transformers_computes_what_we_do(name, write, token_ids):
    written, ids = write(**FLOAT32[name]), token_ids(2, 16)
    loaded = load(written.folder)
    theirs = logits_of(loaded, ids)  # decompresses the weights
    for parameter, weight in written.weights.items():
        assert torch.equal(loaded.get_parameter(parameter), weight.dequantize()), parameter
    check_same_logits(theirs, logits_of(written.expected(torch.float32), ids))
    assert loaded.generate(ids[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("name", ["INT8_W8A8", "W4A8"])
def test_dynamic_int8_differs_by_the_scale_only(name, write, token_ids):
    """compressed-tensors divides the peak by 127.5 where kernels, and we, divide it by 127."""
    written, ids = write(scheme=name), token_ids(2, 16)
    theirs, ours = logits_of(load(written.folder), ids), logits_of(written.expected(torch.float32), ids)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(written.source, dtype=torch.float32), ids)
    assert (theirs - ours).square().mean() < 0.05 * plain.var()
    assert not torch.equal(theirs, ours)


@pytest.mark.parametrize("name", ["MXFP4", "MXFP4A16", "MXFP8", "NVFP4", "NVFP4A16"])
def test_transformers_computes_what_we_do_in_bfloat16(name, write, token_ids):
    """These come back in bfloat16, and compressed-tensors runs them in it only."""
    written, ids = write(scheme=name), token_ids(2, 16)
    loaded = load(written.folder, torch.bfloat16)
    theirs, ours = logits_of(loaded, ids), logits_of(written.expected(torch.bfloat16), ids)
    for parameter, weight in written.weights.items():
        assert torch.equal(loaded.get_parameter(parameter), weight.dequantize(torch.bfloat16)), parameter
    if name != "NVFP4":
        assert torch.equal(theirs, ours)
        return
    # Its group scales are rounded to bfloat16 on the way, so some land on the next E4M3 number.
    plain = logits_of(AutoModelForCausalLM.from_pretrained(written.source, dtype=torch.float32), ids)
    assert (theirs - ours).square().mean() < 0.5 * (ours - plain).square().mean()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"scheme": "W4A16"}, torch.float16), ({"bits": 4, "sym": False}, torch.float16),
        ({"bits": 3, "sym": False, "group_size": 32}, torch.float16), ({"bits": 8, "sym": False}, torch.float16),
        ({"bits": 4, "sym": False, "group_size": -1, "scale_dtype": "bf16"}, torch.bfloat16),
        ({"bits": 4, "scale_dtype": "fp32"}, torch.float32), ({"scheme": "INT8_W8A8"}, torch.float16),
        ({"scheme": "FP8_BLOCK"}, torch.bfloat16), ({"scheme": "MXFP8"}, torch.bfloat16),
        ({"scheme": "NVFP4"}, torch.bfloat16),
    ],
    ids=["w4", "w4-asym", "w3-asym", "w8-asym", "w4-asym-row", "w4-fp32", "int8", "fp8-block", "mxfp8", "nvfp4"],
)  # fmt: skip
def test_weights_dequantized_while_loading_are_ours_rounded_to_the_scales_precision(options, dtype, write):
    """The only way to load asymmetric weights: compressed-tensors 0.20 expects their zero points unpacked otherwise."""
    written = write(**options)
    loaded = load(written.folder, dequantize=True)
    for parameter, weight in written.weights.items():
        assert torch.equal(loaded.get_parameter(parameter), weight.dequantize(dtype).float()), parameter


@pytest.mark.parametrize(("scale_dtype", "exact"), [("bf16", True), ("fp16", False)])
def test_a_bfloat16_model_keeps_bfloat16_scales_only(scale_dtype, exact, write, token_ids):
    """Loaders, vLLM's too, keep the scales of integers in the model's precision."""
    written = write(scheme="W4A16", scale_dtype=scale_dtype, disable_opt_rtn=False)
    loaded = load(written.folder, torch.bfloat16)
    logits_of(loaded, token_ids(1, 4))
    same = [torch.equal(loaded.get_parameter(n), w.dequantize(torch.bfloat16)) for n, w in written.weights.items()]
    assert all(same) is exact


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"scheme": "NVFP4A16"}, "ignores the global scales of NVFP4 experts"),
        ({"scheme": "MXFP8"}, "scales are for groups or blocks"),
        ({"scheme": "FP8_BLOCK", "fp_layers": "self_attn"}, "scales are for groups or blocks"),
        ({"scheme": "INT8_W8A8"}, "INT8"),
        ({"scheme": "W4A16", "sym": False}, "zero points"),
        ({"scheme": "W4A16"}, None),
        ({"scheme": "FP8_DYNAMIC"}, None),
        ({"scheme": "MXFP4"}, None),
        ({"scheme": "MXFP8", "fp_layers": ".experts."}, None),
    ],
    ids=lambda value: str(value["scheme"]) if isinstance(value, dict) else "",
)
def test_experts_that_transformers_does_not_load_are_told(options, warning, make_model):
    model = unfuse(make_model("qwen3_moe", moe_intermediate_size=128, hidden_size=128)).model
    plan = resolve(discover(model), RunConfig.from_options(**options).scheme)
    found = EXPORTERS["llm_compressor"].warnings(plan)
    assert len(found) == (warning is not None)
    assert all(warning in text and "--format auto_round" in text for text in found)


def test_experts_load_and_routers_stay(write):
    """Transformers dequantizes experts in 16 bits."""
    written = write("qwen3_moe", model={}, scheme="W4A16G32")
    loaded = load(written.folder)
    for index, layer in enumerate(loaded.model.layers):
        stem = f"model.layers.{index}.mlp.experts"
        for number in range(4):
            down = written.weights[f"{stem}.{number}.down_proj.weight"].dequantize()
            torch.testing.assert_close(layer.mlp.experts.down_proj[number].float(), down, rtol=2**-8, atol=0)
            weights = [written.weights[f"{stem}.{number}.{leaf}.weight"] for leaf in ("gate_proj", "up_proj")]
            wide = torch.cat([weight.dequantize() for weight in weights])
            torch.testing.assert_close(layer.mlp.experts.gate_up_proj[number].float(), wide, rtol=2**-8, atol=0)
    original = AutoModelForCausalLM.from_pretrained(written.source, dtype=torch.float32)
    assert torch.equal(loaded.model.layers[0].mlp.gate.weight, original.model.layers[0].mlp.gate.weight)


def test_a_tied_output_layer_is_untied_and_loads(write, token_ids):
    written = write(model={**WIDE, "tie_word_embeddings": True}, scheme="FP8_STATIC", quant_lm_head=True)
    ids = token_ids(2, 16)
    loaded = load(written.folder)
    theirs = logits_of(loaded, ids)
    check_same_logits(theirs, logits_of(written.expected(torch.float32), ids))
    assert torch.equal(loaded.lm_head.weight, written.weights["lm_head.weight"].dequantize())


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "NVFP4", "W4A16"])
def test_packed_tensors_are_in_their_own_precision_whatever_the_models(scheme, write):
    tensors = load_file(write(scheme=scheme, model_dtype="fp32").folder / "model.safetensors")
    written = write(scheme=scheme).weights["model.layers.0.mlp.up_proj.weight"]
    assert tensors["model.norm.weight"].dtype == torch.float32
    packed = compressed_layout(written.scheme).pack(written)
    for part, tensor in packed.items():
        stored = tensors[f"model.layers.0.mlp.up_proj.{part}"]
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8))


def test_scales_of_an_fp8_cache_are_loaded(write):
    made = write(scheme="FP8_STATIC", static_kv_dtype="fp8")
    stored = load_file(made.folder / "model.safetensors")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    scheme = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
    assert config["kv_cache_scheme"] == scheme
    loaded = dict(load(made.folder).named_parameters())
    for layer in range(2):
        for side in ("k_scale", "v_scale"):
            name = f"model.layers.{layer}.self_attn.{side}"
            assert stored[name].item() > 0
            assert torch.equal(loaded[name], stored[name])
