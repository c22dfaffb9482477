"""Checkpoints of tiny-llama written by auto-round 0.16.1 (`../shared/golden`), against two oracles.

`dequantized` is an unpacker of its own, independent of `layouts/`. `reference_logits.safetensors` holds what the
reference itself computes: made by running this with auto-round 0.16.1, auto-round-lib and transformers 5.23 (backend
"torch"; for w4g128_asym and mixed_4_8_16, where that crashes, the default "auto"):

    prompts = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(1234))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu",
                                                 quantization_config=AutoRoundConfig(backend=backend))
    save_file({"input_ids": prompts, name: model(prompts).logits[:, -4:].half(), ...}, "reference_logits.safetensors")
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

NATIVE = ["ar_mixed_4_8_16", "ar_w2g32_asym", "ar_w3g128_sym", "ar_w4g128_asym", "ar_w4g128_sym"]
FOREIGN = ["gptq_w4g128_sym", "gptq_w3g128_sym", "awq_w4g128_asym"]
LOGITS = Path(__file__).parent / "reference_logits.safetensors"


def folder_of(shared, name):
    folders = sorted((shared / "golden" / name).glob("*/config.json"))
    if not folders:
        pytest.skip(f"{name} is not there")
    return folders[0].parent


def load(folder, dtype=torch.float32):
    options = {"quantization_config": AutoRoundConfig()} if folder.parent.name in FOREIGN else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def stream(words, bits, count):
    """Codes of each column of int32 words, read as one stream of bits from the lowest on."""
    as_bits = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    return (as_bits[:, : count * bits].reshape(-1, count, bits) << np.arange(bits)).sum(-1)


def awq_columns(words):
    """AWQ: the low nibbles of a word's four bytes are columns 0 4 1 5, the high nibbles 2 6 3 7."""
    parts = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    columns = np.empty((*words.shape, 8), dtype=np.int64)
    columns[..., [0, 4, 1, 5]], columns[..., [2, 6, 3, 7]] = parts & 15, parts >> 4
    return columns.reshape(words.shape[0], -1)


def dense_weight(tensors, config, name):
    scheme = {**config, **config.get("extra_config", {}).get(name, {})}
    qweight, qzeros, scales = (tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    groups, rows = scales.shape
    if "awq" in config.get("packing_format", config["quant_method"]):
        codes, zeros = awq_columns(qweight).T, awq_columns(qzeros)
    else:
        width = qweight.shape[0] * 32 // scheme["bits"]
        codes, zeros = stream(qweight, scheme["bits"], width), stream(qzeros.T, scheme["bits"], rows)
        zeros = zeros + (config.get("packing_format") != "auto_round")
    index = np.arange(codes.shape[1]) // (codes.shape[1] // groups)
    weight = scales.astype(np.float32).T[:, index] * (codes - zeros.T[:, index]).astype(np.float32)
    return torch.from_numpy(weight)


def dequantized(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    state = {f"{name}.weight": dense_weight(tensors, config, name) for name in names}
    state |= {key: tensor.float() for key, tensor in tensors.items() if key.rpartition(".")[0] not in names}
    plain = AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("name", NATIVE + FOREIGN)
def test_logits_are_those_of_the_dequantized_model(shared, name):
    folder = folder_of(shared, name)
    ids = load_file(LOGITS)["input_ids"]
    model, plain = load(folder), dequantized(folder)
    # The same float32 weights in the same kernels: only the order of sums may differ.
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=0, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("name", NATIVE)
def test_logits_are_those_of_the_reference(shared, name):
    reference = load_file(LOGITS)
    ours = logits(load(folder_of(shared, name)), reference["input_ids"])[:, -4:]
    # Logits up to 9 are stored in float16: 0.004. The reference rounds dequantized weights to float16 (2**-11), which
    # four blocks carry to about 2**-10 of the logits: 0.009. Another rounding of the weights would show as 0.5.
    torch.testing.assert_close(ours, reference[name].float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", NATIVE + FOREIGN)
def test_bfloat16_logits_are_as_near_as_bfloat16_allows(shared, name):
    folder = folder_of(shared, name)
    ids = load_file(LOGITS)["input_ids"]
    difference = logits(load(folder, torch.bfloat16), ids).float() - logits(dequantized(folder), ids)
    # docs/peers.md, section 0: bf16 engines reach 0.03-0.09, an unquantized bf16 model 0.04.
    assert float(difference.abs().max()) < 0.15
