"""llama.cpp itself (the xllamacpp wheel) loads the files, generates, and computes what the dequantized weights do.

The engine gives log probabilities of all tokens for the last position; every prefix of a prompt is asked for. Files in
fp16 show that the architecture is understood, quantized ones that the blocks are.
"""

from pathlib import Path

import pytest
import torch

from .conftest import FAMILIES, VOCABULARY

PROMPT = [1, 40, 77, 120, 9, 200, 33, 250, 64, 18, 99, 140, 7, 61]
MIXES = ["q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1"]
MIXES += ["q5_k_s", "q5_k_m", "q6_k", "q8_0", "fp16", "bf16"]
# Where a token is a part of a character, or the end, the engine answers with nothing.
ASCII, BYTES = 20, [*range(3), *range(94, 259)]
# llama.cpp rounds activations to 8 bits where weights are quantized, and to bfloat16 where they are bfloat16.
FLOAT, QUANTIZED = 0.08, 0.3


class LlamaCpp:
    """A file loaded by llama.cpp on one thread."""

    def __init__(self, file: Path) -> None:
        package = pytest.importorskip("xllamacpp")
        parameters = package.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 128, 1, False, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self.server = package.Server(parameters)

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Returns (len(ids), vocabulary) log probabilities of the next token after each prefix."""
        return torch.stack([self._last(ids[: end + 1]) for end in range(len(ids))])

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Returns the ids of the likeliest continuation."""
        answer = self._complete(ids, max_tokens=tokens, n_probs=1, logprobs=1, logit_bias=[[id, -1e9] for id in BYTES])
        return [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text without special tokens before it."""
        return self.server.handle_tokenize({"content": text, "add_special": False})["tokens"]

    def _last(self, ids: list[int]) -> torch.Tensor:
        # The biased token is taken, which does not change the probabilities that are reported.
        options = {"n_probs": VOCABULARY, "logprobs": VOCABULARY, "logit_bias": [[ASCII, 1000.0]]}
        answer = self._complete(ids, max_tokens=1, **options)
        found = torch.full((VOCABULARY,), -torch.inf)
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def _complete(self, ids: list[int], **options):
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
    assert difference(engine.log_probabilities(PROMPT), expected, record_property) < QUANTIZED
