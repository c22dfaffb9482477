"""Scales and minima stored as they are, against llama.cpp's quantizers."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types.affine_search import search_affine
from auto_round.schemes import PRESET_SCHEMES
from auto_round.tuning.rtn import round_searched

# As in test_superblock_search.py: ggml_quantize_chunk of ggml 0.25.3 on the same rows.
LLAMA_CPP = {"Q4_1": (0.00872625, 0.00625966), "Q5_1": (0.00200121, 0.00145980)}


def heavy_tailed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    normal = torch.randn(16, 1024, generator=generator)
    spread = torch.randn(4, 16, 1024, generator=generator).square().mean(0).sqrt()
    return normal / spread * 0.02, torch.randn(1024, generator=generator).exp()


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_the_error_is_below_that_of_llama_cpp(kind):
    weight, importance = heavy_tailed_rows()
    for given, theirs in zip((None, importance), LLAMA_CPP[kind], strict=True):
        weights = torch.ones(1024) if given is None else given
        residual = round_searched(weight, PRESET_SCHEMES[f"GGUF:{kind}"], given).dequantize() - weight
        assert float((weights * residual.square()).sum() / (weights * weight.square()).sum()) < theirs


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_the_range_is_what_is_stored(kind):
    weight, importance = heavy_tailed_rows()
    for tensor in search_affine(weight, PRESET_SCHEMES[f"GGUF:{kind}"], importance).values():
        assert torch.equal(tensor, tensor.half().float())


def test_a_minimum_may_lie_above_zero():
    """Weights around 10 that lie on a grid of float16 numbers come back exactly."""
    weight = 10 + 0.125 * torch.arange(32.0).remainder(16)[None]
    quantized = round_searched(weight, PRESET_SCHEMES["GGUF:Q4_1"], None)
    assert torch.equal(quantized.dequantize(), weight)
    assert float(quantized.offset) == 10.0


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_extreme_rows_stay_finite(kind):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(80, 32, generator=generator)
    weight[0::8] = 0
    weight[1::8] = 0.7
    weight[2::8, 3] = 1e30
    weight[3::8] = 1e-40
    weight[4::8] *= 3e37
    assert round_searched(weight, PRESET_SCHEMES[f"GGUF:{kind}"], None).dequantize().isfinite().all()
