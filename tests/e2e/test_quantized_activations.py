"""What was tuned with quantized activations is what a loaded checkpoint computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round import AutoRound

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # whole blocks of FP8_BLOCK
CASES = {
    "FP8_STATIC": {},
    "FP8_DYNAMIC": {},
    "FP8_BLOCK": {},
    "FPW8A16": {},
    "MXFP4": {"layer_config": {"down_proj": "MXFP8", "o_proj": 16}},
    "MXFP8": {},
    "NVFP4": {"quant_lm_head": True},
    "INT8_W8A8": {},
    "W4A8": {"group_size": 32},
}


@pytest.mark.parametrize("scheme", CASES)
def test_a_loaded_model_computes_what_was_tuned(tmp_path, make_model, token_ids, scheme):
    model, ids = make_model("llama", **SIZES), token_ids()
    options = {"dataset": ids, "iters": 2, "nsamples": 8, "seqlen": 16, "batch_size": 4, "device": "cpu"}
    rounder = AutoRound(model, scheme=scheme, **options, **CASES[scheme])
    model, _ = rounder.quantize_and_save(tmp_path, format="auto_round")
    for name, quantize in rounder.input_quantizers().items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, quantize=quantize: quantize(*inputs))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
    ).eval()
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    # The same float32 numbers; calibrated ranges are stored as scales, which may differ in the last bit.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
