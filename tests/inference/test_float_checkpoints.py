"""Checkpoints with float weights or quantized activations, loaded through Transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

from auto_round.data_types.activations import quantize_activation
from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.inference.layer import QuantizedLinear
from auto_round.layouts.by_scheme import compressed_layout
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

COMPRESSED = "auto_round:llm_compressor"
ACT_INT8 = {"act_bits": 8, "act_data_type": "int", "act_group_size": -1, "act_sym": True}
NAMED = (
    "FP8_STATIC", "FP8_DYNAMIC", "FPW8A16", "MXFP4", "MXFP8", "MXFP4A16", "NVFP4", "NVFP4A16", "INT8_W8A8",
)  # fmt: skip
# Name -> scheme, layout, packing_format. None: what is written where nothing is said.
CASES = {
    **{name: (PRESET_SCHEMES[name], compressed_layout(PRESET_SCHEMES[name]).name, COMPRESSED) for name in NAMED},
    "W4A8": (QuantizationScheme(group_size=32, **ACT_INT8), "ct_packed", COMPRESSED),
    "W4A8 gptq": (QuantizationScheme(group_size=32, **ACT_INT8), "gptq", "auto_round:auto_gptq"),
    "own FP8_STATIC": (PRESET_SCHEMES["FP8_STATIC"], "fp8_flat", "auto_round:fp8_static"),
    "own FPW8A16": (PRESET_SCHEMES["FPW8A16"], "fp8_flat", None),
    "own MXINT4": (PRESET_SCHEMES["MXINT4"], "mxint4", "auto_round"),
}
SIZES = {"hidden_size": 192}  # MX needs whole groups of 32; the other widths are 64 and 352


def fields_of(scheme):
    left_out = ("scale_dtype", "super_bits", "super_group_size")
    return {key: value for key, value in scheme.to_dict().items() if value is not None and key not in left_out}


def config_of(scheme, packing, **more):
    said = {} if packing is None else {"packing_format": packing}
    base = {"quant_method": "auto-round", "block_name_to_quantize": "model.layers"}
    return {**base, **fields_of(scheme), **said, **more}


def in_blocks(scheme):
    return lambda layer: scheme if ".layers." in layer else None


def load(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def write(make_checkpoint):
    def make(name, **options):
        scheme, layout, packing = CASES[name]
        return make_checkpoint(
            config_of(scheme, packing),
            in_blocks(scheme),
            layout,
            **SIZES,
            **options,
        )

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_dequantized_weights_on_quantized_inputs(write, name):
    checkpoint = write(name)
    model = load(checkpoint.folder, device_map="cpu", quantization_config=AutoRoundConfig(backend="torch"))
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)
    # The same float32 numbers in the same kernels.
    expected = logits(checkpoint.dense, checkpoint.ids)
    torch.testing.assert_close(logits(model, checkpoint.ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["FP8_STATIC", "FP8_DYNAMIC", "INT8_W8A8"])
def test_the_backend_chosen_by_itself_agrees(write, name):
    checkpoint = write(name)
    model = load(checkpoint.folder)
    expected = logits(checkpoint.dense, checkpoint.ids)
    # Products in another order: an input at a tie may round the other way, by a step of 1 in 16 (FP8) or 127.
    assert (logits(model, checkpoint.ids) - expected).abs().mean() < 1e-2 * expected.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_saving_and_loading_again_changes_nothing(write, tmp_path, name, dtype):
    checkpoint = write(name)
    model = load(checkpoint.folder, dtype)
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (checkpoint.folder, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    layers = [key for key in stored if "_proj." in key]
    assert len(layers) >= 2 * 14
    assert all(stored[key].dtype == saved[key].dtype for key in layers)
    assert all(torch.equal(as_bytes(stored[key]), as_bytes(saved[key])) for key in layers)
    again = load(tmp_path / "saved", dtype)
    assert torch.equal(logits(again, checkpoint.ids), logits(model, checkpoint.ids))


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_casting_the_model_keeps_what_is_stored(write, name):
    model = load(write(name).folder)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "_proj." in key}
    after = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(as_bytes(after[key]), as_bytes(tensor)) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["FP8_STATIC", "MXFP4", "NVFP4", "INT8_W8A8"])
def test_generate_works(write, name):
    checkpoint = write(name)
    tokens = load(checkpoint.folder, torch.bfloat16).generate(checkpoint.ids, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, checkpoint.ids.shape[1] + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_may_be_stored_in_another_precision(write, dtype):
    def narrow(tensors):
        for name in tensors:
            if name.endswith(("_scale", "input_scale")):
                # Powers of two, which each precision holds.
                tensors[name] = torch.exp2(tensors[name].float().log2().round()).to(dtype)

    checkpoint = write("FP8_STATIC", edit=narrow)
    reference = load_file(checkpoint.folder / "model.safetensors")
    state = load(checkpoint.folder).state_dict()
    scales = [name for name in reference if name.endswith("_scale")]
    assert len(scales) == 28
    assert all(torch.equal(state[name].float(), reference[name].float()) for name in scales)


def test_blocks_load_when_transformers_is_told_a_group_size_it_knows(make_checkpoint):
    scheme = PRESET_SCHEMES["FP8_BLOCK"].replace(group_size=(64, 32), act_group_size=32)
    config = config_of(scheme, "auto_round:fp8", group_size=32, weight_block_size=[64, 32])
    checkpoint = make_checkpoint(config, in_blocks(scheme), "fp8_flat", **SIZES)
    expected = logits(checkpoint.dense, checkpoint.ids)
    torch.testing.assert_close(logits(load(checkpoint.folder), checkpoint.ids), expected, rtol=0, atol=1e-5)


def test_a_group_size_that_transformers_refuses_can_be_repaired_in_the_config(make_checkpoint):
    scheme = PRESET_SCHEMES["FPW8A16"].replace(group_size=0)
    checkpoint = make_checkpoint(config_of(scheme, None), in_blocks(scheme), "fp8_flat", **SIZES)
    with pytest.raises(ValueError, match="group_size must be greater than 0"):
        load(checkpoint.folder)
    config = AutoConfig.from_pretrained(checkpoint.folder)
    config.quantization_config |= {"group_size": -1, "extra_config": {".*layers.*": {"group_size": 0}}}
    expected = logits(checkpoint.dense, checkpoint.ids)
    torch.testing.assert_close(
        logits(load(checkpoint.folder, config=config), checkpoint.ids), expected, rtol=0, atol=1e-5
    )


def test_mixed_layers_load_with_their_own_layouts(make_checkpoint):
    base, eight = PRESET_SCHEMES["MXFP4"], PRESET_SCHEMES["MXFP8"]
    special = {
        "model.layers.0.mlp.down_proj": {"bits": 8, "act_bits": 8},
        "model.layers.1.mlp.down_proj": {"bits": 16, "act_bits": 16},
        "lm_head": fields_of(PRESET_SCHEMES["NVFP4"]),
    }
    schemes = {"model.layers.0.mlp.down_proj": eight, "model.layers.1.mlp.down_proj": None}
    schemes["lm_head"] = PRESET_SCHEMES["NVFP4"]
    checkpoint = make_checkpoint(
        config_of(base, COMPRESSED, extra_config=special),
        lambda layer: schemes.get(layer, base if ".layers." in layer else None),
        lambda scheme: compressed_layout(scheme).name,
        tie_word_embeddings=False,
        **SIZES,
    )
    model = load(checkpoint.folder)
    assert isinstance(model.model.layers[1].mlp.down_proj, torch.nn.Linear)
    assert [model.lm_head.spec.layout, model.model.layers[0].mlp.down_proj.spec.layout] == ["nvfp4", "mxfp8"]
    expected = logits(checkpoint.dense, checkpoint.ids)
    torch.testing.assert_close(logits(model, checkpoint.ids), expected, rtol=0, atol=1e-5)


def test_fake_checkpoints_run_with_quantized_inputs(make_checkpoint):
    scheme = PRESET_SCHEMES["MXFP4"]
    checkpoint = make_checkpoint(config_of(scheme, "auto_round:fake"), in_blocks(None), **SIZES)
    for name, module in checkpoint.dense.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: quantize_activation(*inputs, scheme.activation))
    model = load(checkpoint.folder)
    assert torch.equal(logits(model, checkpoint.ids), logits(checkpoint.dense, checkpoint.ids))
    assert model.state_dict().keys() == checkpoint.dense.state_dict().keys()


def test_a_missing_calibrated_range_is_an_error(write):
    checkpoint = write("FP8_STATIC", edit=lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.input_scale"))
    with pytest.raises(CheckpointError, match=r"e\.g\. model\.layers\.0\.mlp\.up_proj\.input_scale"):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    ("scheme", "packing", "text"),
    [
        (PRESET_SCHEMES["FP8_STATIC"], "auto_round:fake", r"layout dense cannot hold calibrated ranges of activations"),
        (PRESET_SCHEMES["MXFP6"], COMPRESSED, r"cannot hold .*\(14 modules, e\.g\. model\.layers\.0"),
        (PRESET_SCHEMES["NVFP4"].replace(bits=4, act_bits=8), COMPRESSED, r"act_bits=8 with act_data_type=nv_fp4_with"),
    ],
    ids=["no ranges", "no layout", "no such activations"],
)
def test_what_cannot_run_is_refused(make_checkpoint, scheme, packing, text):
    checkpoint = make_checkpoint(config_of(scheme, packing), in_blocks(None), **SIZES)
    with pytest.raises(UnsupportedError, match=text):
        load(checkpoint.folder)


def test_a_backend_that_does_not_quantize_activations_says_so(write):
    with pytest.raises(UnsupportedError, match=r"activations=int8 per token dynamic \(only 16-bit\)"):
        load(write("W4A8 gptq").folder, quantization_config=AutoRoundConfig(backend="torch_cpu_int4"))


def test_the_config_is_saved_with_what_it_said(write, tmp_path):
    load(write("NVFP4").folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (saved["data_type"], saved["act_data_type"], saved["packing_format"]) == (
        "nv_fp",
        "nv_fp4_with_static_gs",
        COMPRESSED,
    )
