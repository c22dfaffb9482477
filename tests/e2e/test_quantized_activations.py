"""What was tuned with quantized activations is what a loaded checkpoint computes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round import AutoRound
from auto_round.layouts.by_scheme import compressed_layout

SIZES = {"hidden_size": 64, "intermediate_size": 128}
SCHEMES = ["FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "MXFP8", "NVFP4", "INT8_W8A8", "W4A8"]


def write_checkpoint(folder, rounder, model):
    """Writes what the store of a run holds, in the layouts of compressed-tensors."""
    tensors = model.state_dict()
    for block in rounder._store.finished():
        for parameter, weight in rounder._store.load(block).weights.items():
            name = parameter.removesuffix(".weight")
            del tensors[parameter]
            packed = compressed_layout(weight.scheme).pack(weight)
            tensors |= {f"{name}.{local}": tensor for local, tensor in packed.items()}
            scheme = weight.scheme
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    said = {key: value for key, value in scheme.to_dict().items() if value is not None and key != "scale_dtype"}
    if isinstance(scheme.group_size, tuple):
        said |= {"group_size": scheme.group_size[1], "weight_block_size": list(scheme.group_size)}
    said |= {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loaded_model_computes_what_was_tuned(tmp_path, make_model, token_ids, scheme):
    model, ids = make_model("llama", **SIZES), token_ids()
    options = {"dataset": ids, "iters": 2, "nsamples": 8, "seqlen": 16, "batch_size": 4, "device": "cpu"}
    fields = {"layer_config": {"proj": {"group_size": 32}}} if scheme == "W4A8" else {}
    rounder = AutoRound(model, scheme=scheme, **options, **fields)
    model, _ = rounder.quantize()
    write_checkpoint(tmp_path, rounder, model)
    for name, quantize in rounder.input_quantizers().items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, quantize=quantize: quantize(*inputs))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
    ).eval()
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    # The same float32 numbers; calibrated ranges are stored as scales, which may differ in the last bit.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
