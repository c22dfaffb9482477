"""llama.cpp itself (the xllamacpp wheel) loads the files, generates, and computes what the dequantized weights do.

The engine gives log probabilities of all tokens for the last position; every prefix of a prompt is asked for. Files in
fp16 show that the architecture is understood, quantized ones that the blocks are.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.formats.gguf.pre_tokenizers import LLAMA3, O200K, QWEN2, QWEN35, TEKKEN

from .conftest import FAMILIES, VOCABULARY, byte_level_tokenizer, piece_tokenizer

PATTERNS = {"llama-bpe": LLAMA3, "dbrx": LLAMA3, "qwen2": QWEN2, "qwen35": QWEN35, "gpt-4o": O200K, "tekken": TEKKEN}

PROMPT = [1, 40, 77, 120, 9, 200, 33, 250, 64, 18, 99, 140, 7, 61]
MIXES = ["q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1"]
MIXES += ["q5_k_s", "q5_k_m", "q6_k", "q8_0", "fp16", "bf16"]
# Where a token is a part of a character, or the end, the engine answers with nothing.
ASCII, BYTES = 20, [*range(3), *range(94, 259)]
# llama.cpp rounds activations to 8 bits where weights are quantized, and to bfloat16 where they are bfloat16.
# Logits span 9; in 8 layers of random weights that rounding adds up to more than in 3.
FLOAT, QUANTIZED, DEEP = 0.02, 0.3, 0.45
# The same rounding sends a token to another expert now and then, which changes it and those after it.
ROUTED = [name for name in FAMILIES if "mixtral" in name or "moe" in name or "deepseek" in name or name == "gpt-oss"]


@pytest.fixture(autouse=True)
def engine_is_there(request):
    """Skips before anything is exported where llama.cpp is not installed."""
    if request.node.name.startswith("test_llama_cpp"):
        pytest.importorskip("xllamacpp")


class LlamaCpp:
    """A file loaded by llama.cpp on one thread."""

    def __init__(self, file: Path) -> None:
        import xllamacpp as package

        parameters = package.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 128, 1, False, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self.server = package.Server(parameters)

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Returns (len(ids), vocabulary) log probabilities of the next token after each prefix."""
        return torch.stack([self.last(ids[: end + 1]) for end in range(len(ids))])

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Returns the ids of the likeliest continuation."""
        answer = self._complete(ids, max_tokens=tokens, n_probs=1, logprobs=1, logit_bias=[[id, -1e9] for id in BYTES])
        return [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]

    def last(self, ids: list[int] | str) -> torch.Tensor:
        """Returns (vocabulary,) log probabilities of the token after a prompt, given as ids or as text."""
        # The biased token is taken, which does not change the probabilities that are reported.
        options = {"n_probs": VOCABULARY, "logprobs": VOCABULARY, "logit_bias": [[ASCII, 1000.0]]}
        answer = self._complete(ids, max_tokens=1, **options)
        found = torch.full((VOCABULARY,), -torch.inf)
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def _complete(self, ids: list[int] | str, **options):
        fixed = {"temperature": 0, "post_sampling_probs": False, "cache_prompt": False, "ignore_eos": False}
        return self.server.handle_completions({"prompt": ids, **fixed, **options})


def wanted(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def difference(found: torch.Tensor, expected: torch.Tensor, record_property) -> float:
    """Returns the median over positions of the largest difference; all figures go into the report of the run."""
    known = found.isfinite()
    largest = torch.where(known, (found - expected).abs(), 0).amax(-1)
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    record_property("largest difference", float(largest.max()))
    record_property("equal best token", same)
    print(
        f"median {float(largest.median()):.4f} largest {float(largest.max()):.4f} best {same:.3f} "
        f"range {float(expected.max() - expected.min()):.1f} known {float(known.float().mean()):.2f}"
    )
    assert known.float().mean() > 0.99
    return float(largest.median())


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_each_architecture(export_gguf, tmp_path, record_property, name):
    exported = export_gguf("fp16", name)
    engine = LlamaCpp(exported.files[0])
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < FLOAT
    assert len(engine.generate(PROMPT, 6)) >= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_each_architecture_in_4_bits(export_gguf, tmp_path, record_property, name):
    exported = export_gguf("q4_k_m", name)
    engine = LlamaCpp(exported.files[0])
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < (
        DEEP if name in ROUTED else QUANTIZED
    )


@pytest.mark.parametrize("mix", MIXES)
def test_llama_cpp_computes_each_mixture(export_gguf, tmp_path, record_property, mix):
    exported = export_gguf(mix, "llama", model={"num_hidden_layers": 8})
    engine = LlamaCpp(exported.files[0])
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < DEEP


# Widths that 256 does not divide, and one that 32 does not.
NARROW = {"hidden_size": 192, "intermediate_size": 352, "head_dim": 48}
ODD = {"hidden_size": 192, "intermediate_size": 344, "head_dim": 48}


@pytest.mark.parametrize(("mix", "model"), [("q4_k_m", NARROW), ("q2_k", NARROW), ("q6_k", ODD), ("q5_k_s", ODD)])
def test_llama_cpp_computes_what_falls_back(export_gguf, tmp_path, record_property, mix, model):
    exported = export_gguf(mix, "llama", model=model)
    engine = LlamaCpp(exported.files[0])
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < QUANTIZED


OVERRIDES = {
    "types": {"layer_config": {"layers.0.mlp": "gguf:q8_0", "lm_head": "gguf:q4_0", "embed_tokens": 8}},
    "16-bit": {"fp_layers": "lm_head,embed_tokens,layers.1"},
    "split": {"max_shard_size": "300KB"},
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_llama_cpp_computes_mixed_types_and_split_files(export_gguf, tmp_path, record_property, name):
    exported = export_gguf("q4_k_m", "llama", **OVERRIDES[name])
    assert (len(exported.files) > 2) == (name == "split")
    engine = LlamaCpp(exported.files[0])
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < QUANTIZED


TEXTS = ["the king isn't here in 1234 places", "Hello,   World!\n\n\tdef f(x):  return x+1", "Ünïcödé 日本 🙂 the"]


@pytest.mark.parametrize("name", PATTERNS)
def test_llama_cpp_tokenizes_as_the_tokenizer_does(export_gguf, save_model, name):
    tokenizer = byte_level_tokenizer(PATTERNS[name], ignore_merges=name in ("llama-bpe", "tekken"))
    exported = export_gguf("bf16", folder=save_model(tokenizer=tokenizer))
    assert exported.metadata()["tokenizer.ggml.pre"] == name
    engine = LlamaCpp(exported.files[0])
    for text in TEXTS:
        torch.testing.assert_close(engine.last(text), engine.last(tokenizer.encode(text).ids))


def test_llama_cpp_tokenizes_pieces_as_the_tokenizer_does(export_gguf, save_model):
    tokenizer = piece_tokenizer()
    folder = save_model(tokenizer=tokenizer)
    exported = export_gguf("bf16", folder=folder)
    engine = LlamaCpp(exported.files[0])
    for text in TEXTS:
        torch.testing.assert_close(engine.last(text), engine.last(tokenizer.encode(text).ids))


# Architectures whose GGUF files Transformers reads, and the sizes that it takes for granted instead of reading them.
WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256}
IN_TRANSFORMERS = {
    "llama": {},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3-moe": {"head_dim": 128, "moe_intermediate_size": 768},
    "starcoder2": {},
    "gemma2": WIDE,
    "gemma3": WIDE,
    "phi3": {},
}


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_loads_the_same_weights(export_gguf, tmp_path, record_property, name):
    exported = export_gguf("q4_k_m", name, model=IN_TRANSFORMERS[name])
    file = exported.files[0]
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    expected = wanted(exported.dequantized_model(tmp_path / "dense"))
    with torch.no_grad():
        found = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    record_property("largest difference", float((found - expected).abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
