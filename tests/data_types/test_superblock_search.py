"""Codes and units of super-blocks: better than llama.cpp's own, not improved by any single change, always finite."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.superblock_search import default_weights, grid_of
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tensors import QuantizedTensor

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Weighted squared error over weighted power that llama.cpp's quantizers leave on `heavy_tailed_rows`, without and with
# an importance matrix: ggml_quantize_chunk of ggml 0.25.3, decoded by gguf.quants.
LLAMA_CPP = {
    "Q2_K": (0.0245657, 0.0750745),
    "Q3_K": (0.00173689, 0.0286209),
    "Q4_K": (0.00358185, 0.00654548),
    "Q5_K": (0.000933190, 0.00171471),
    "Q6_K": (2.36307e-05, 0.000474378),
}


def heavy_tailed_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (16, 1024) weights of Student's t with 4 degrees, and the importance of their channels."""
    generator = torch.Generator().manual_seed(11)
    normal = torch.randn(16, 1024, generator=generator)
    spread = torch.randn(4, 16, 1024, generator=generator).square().mean(0).sqrt()
    return normal / spread * 0.02, torch.randn(1024, generator=generator).exp()


def rounded(weight: torch.Tensor, scheme: QuantizationScheme, importance: torch.Tensor | None) -> QuantizedTensor:
    data_type = DATA_TYPES["int_dq"]
    range_ = data_type.search_range(weight, scheme, importance)
    return data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))


def llama_cpp_weights(weight: torch.Tensor, scheme: QuantizationScheme) -> torch.Tensor:
    """Returns what llama.cpp weighs errors with when it has no importance matrix."""
    return default_weights(weight.unflatten(1, (-1, scheme.group_size)), scheme).flatten(1)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_the_error_is_below_that_of_llama_cpp(kind):
    scheme, (weight, importance) = PRESET_SCHEMES[f"GGUF:{kind}"], heavy_tailed_rows()
    weighing = (llama_cpp_weights(weight, scheme), importance)
    for given, weights, theirs in zip((None, importance), weighing, LLAMA_CPP[kind], strict=True):
        residual = rounded(weight, scheme, given).dequantize() - weight
        assert float((weights * residual.square()).sum() / (weights * weight.square()).sum()) < theirs


def test_weights_without_importance_are_those_of_llama_cpp():
    x = torch.tensor([[[3.0, -4.0]]])
    assert default_weights(x, PRESET_SCHEMES["GGUF:Q3_K"]).tolist() == [[[9.0, 16.0]]]
    assert default_weights(x, PRESET_SCHEMES["GGUF:Q2_K"]).tolist() == [[[3.0, 4.0]]]
    rms = 12.5**0.5
    assert default_weights(x, PRESET_SCHEMES["GGUF:Q4_K"])[0, 0].tolist() == pytest.approx([3 + rms, 4 + rms])


@pytest.mark.parametrize("kind", K_QUANTS)
def test_no_other_code_of_one_scale_is_better(kind):
    scheme, (weight, importance) = PRESET_SCHEMES[f"GGUF:{kind}"], heavy_tailed_rows()
    weight, data_type, grid = weight[:2], DATA_TYPES["int_dq"], grid_of(scheme)
    range_ = dict(data_type.search_range(weight, scheme, importance))
    params = data_type.trainable(weight, scheme)

    def errors(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        residual = data_type.fake_quantize(weight, scheme, changed, params) - weight
        return (importance * residual.square()).double().unflatten(1, (-1, scheme.group_size)).sum(-1)

    found = errors(range_)
    for step in (-1, 1):
        shifted = (range_["scale_codes"] + step).clamp(*grid.code_bounds)
        # The floor of importance and float32 sums decide between equals.
        assert (errors(range_ | {"scale_codes": shifted}) >= found * (1 - 1e-4)).all()


def adversarial_rows(count: int) -> torch.Tensor:
    """Returns (count, 256): a super-block a row, of every kind that breaks a division, a square or a sum."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(count, 256, generator=generator)
    rows *= 10.0 ** torch.randint(-6, 3, (count, 1), generator=generator)
    rows[0::10] = 0
    rows[1::10] = rows[1::10, :1]  # constants
    rows[2::10, 17] = 1e30  # one huge weight
    rows[3::10] = 1e-40  # denormal numbers
    rows[4::10] *= 1e-38
    rows[5::10, ::2] = 0
    rows[6::10] = rows[6::10].abs()  # no negative ones
    rows[7::10, :16] = -3e38
    return rows


@pytest.mark.parametrize("kind", K_QUANTS)
@pytest.mark.parametrize("weighting", ["none", "squares", "no channel seen"])
def test_no_super_block_gives_a_number_that_is_not_finite(kind, weighting):
    weight = adversarial_rows(700)
    importance = {
        "none": None,
        "squares": torch.randn(256, generator=torch.Generator().manual_seed(6)).exp(),
        "no channel seen": torch.zeros(256),
    }[weighting]
    quantized = rounded(weight, PRESET_SCHEMES[f"GGUF:{kind}"], importance)
    assert quantized.dequantize().isfinite().all()
    for unit in (quantized.super_scale, quantized.super_offset):
        assert unit is None or unit.half().isfinite().all()
    assert not quantized.dequantize()[0::10].any()


def test_a_constant_block_is_kept_within_a_step():
    weight = torch.full((1, 256), 0.3)
    for kind in K_QUANTS:
        assert (rounded(weight, PRESET_SCHEMES[f"GGUF:{kind}"], None).dequantize() - 0.3).abs().max() < 3e-4


@pytest.mark.parametrize("kind", K_QUANTS)
def test_rows_do_not_depend_on_each_other(kind):
    """So that a large matrix may be quantized in pieces of rows."""
    scheme, (weight, importance) = PRESET_SCHEMES[f"GGUF:{kind}"], heavy_tailed_rows()
    whole, part = rounded(weight, scheme, importance), rounded(weight[5:7], scheme, importance)
    assert torch.equal(whole.dequantize()[5:7], part.dequantize())


def test_a_row_that_ends_within_a_super_block_is_searched_too():
    scheme, (weight, importance) = PRESET_SCHEMES["GGUF:Q4_K"], heavy_tailed_rows()
    plain_range = DATA_TYPES["int_dq"].minmax_range(weight[:, :336], scheme)
    params = DATA_TYPES["int_dq"].trainable(weight[:, :336], scheme)
    plain = DATA_TYPES["int_dq"].encode(weight[:, :336], scheme, plain_range, params)
    searched = rounded(weight[:, :336], scheme, importance[:336])
    assert searched.super_scale is not None
    assert searched.super_scale.shape == (16, 2)
    errors = [(importance[:336] * (q.dequantize() - weight[:, :336]).square()).sum() for q in (searched, plain)]
    assert errors[0] < errors[1]
