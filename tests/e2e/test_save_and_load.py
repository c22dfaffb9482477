"""A quantized folder, loaded by Transformers with nothing but this package, computes what dequantized weights do."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from auto_round import AutoRound

CASES = {
    "w4-sym": {"bits": 4},
    "w4-asym": {"bits": 4, "sym": False},
    "w2-sym": {"bits": 2, "group_size": 32},
    "w2-asym": {"bits": 2, "group_size": 32, "sym": False},
    "w3-sym": {"bits": 3},
    "w3-asym": {"bits": 3, "sym": False},
    "w5-sym": {"bits": 5},
    "w8-sym": {"bits": 8},
    "w8-asym": {"bits": 8, "sym": False},
    "per-row": {"bits": 4, "group_size": -1},
    "bf16-scales": {"bits": 4, "scale_dtype": "bf16"},
    "mixed": {"bits": 4, "layer_config": {"down_proj": 8, "layers.0.self_attn": {"bits": 2, "sym": False}}},
    "kept": {"bits": 4, "fp_layers": "layers.1.mlp"},
    "head": {"bits": 4, "quant_lm_head": True},
    "head-w2-asym": {"bits": 2, "sym": False, "layer_config": {"lm_head": {"bits": 8, "sym": True}}},
    "norms": {"bits": 4, "enable_norm_bias_tuning": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def token_ids():
    return torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))


def random_llama(folder, *, tied: bool, intermediate: int = 172):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def logits_of(folder, ids, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model, model(ids).logits.float()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", list(CASES))
def test_loaded_model_computes_what_its_dequantized_weights_do(tmp_path, token_ids, name, tied):
    source = random_llama(tmp_path / "model", tied=tied)
    rounder = AutoRound(
        str(source), dataset=token_ids, iters=2, nsamples=8, seqlen=16, batch_size=4, device="cpu", **CASES[name]
    )
    _, (packed, fake) = rounder.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    model, found = logits_of(packed, token_ids)
    _, wanted = logits_of(fake, token_ids)
    # The fake folder holds bfloat16 weights, the packed one computes scale * (code - zero) in float32: 8 bits of
    # mantissa against 24, over 14 layers; a wrong layout or zero point is off by the size of the logits.
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()
    generated = model.generate(token_ids[:1], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > token_ids.shape[1]


@pytest.mark.parametrize("name", ["babyllama", "stories260K"])
@pytest.mark.parametrize("bits", [2, 4])
def test_odd_shapes_of_trained_models_load_and_generate(tmp_path, shared, name, bits):
    source = shared / "models" / "tiny" / name
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = str(shared / "text" / "tinystories.txt")
    options = {"iters": 2, "nsamples": 8, "seqlen": 64, "batch_size": 4, "device": "cpu"}
    rounder = AutoRound(str(source), bits=bits, dataset=text, **options)
    _, (packed, fake) = rounder.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    model, found = logits_of(packed, ids)
    _, wanted = logits_of(fake, ids)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
