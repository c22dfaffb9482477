"""Integers under two levels of scales: the super-blocks of GGUF (Q2_K to Q6_K).

A group has an integer scale code, and when asymmetric an integer minimum code; neighbouring groups, a super-block,
share the float16 numbers d and d_min that these count in:

    symmetric:  W_hat = (d * scale_code) * (q - 2**(bits-1))           scale codes signed
    asymmetric: W_hat = (d * scale_code) * q - (d_min * minimum_code)  both codes unsigned

with q = clamp(round((W + minimum) / scale + V), 0, 2**bits - 1). The products in brackets are exact in float32. Only
V is tuned. Clip factors on the codes of scales and minima undid more than the offsets gained: models/lm-6m, Q2_K, 24
steps: perplexity 26.75 with them, 24.46 without; a block of 256 channels, Q4_K, 50 steps: 0.67 of the first error with
them (0.19 with factors a fortieth as strong), 0.14 without.

Letters: S super-blocks of a row; the last one may be cut, as the last group may. Source: ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types.base import DATA_TYPES, Params, Range, RoundingState, offset_by, round_ste
from auto_round.data_types.superblock_search import grid_of, search_superblocks
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, from_groups, to_groups


class SuperBlockDataType:
    """The data type "int_dq". Stateless."""

    name = "int_dq"
    has_tensor_scale = False

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for anything but groups of one row below super-blocks of some width."""
        if not isinstance(scheme.group_size, int) or scheme.group_size < 1:
            return f"group_size={scheme.group_size} (super-blocks have groups of a fixed size)"
        if not scheme.super_bits or not scheme.super_group_size:
            asked = f"super_bits={scheme.super_bits} super_group_size={scheme.super_group_size}"
            return f"{asked} (both are needed; presets gguf:q2_k, q3_k, q4_k, q5_k, q6_k have them)"
        if not 2 <= scheme.super_bits <= 8 or scheme.super_group_size < 1:
            return f"super_bits={scheme.super_bits} super_group_size={scheme.super_group_size} (2 to 8; 1 or more)"
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a group's codes and of its share of the super-block's scales."""
        assert scheme.super_bits is not None
        assert scheme.super_group_size is not None
        kinds = 1 if scheme.sym else 2
        width = 32 if scheme.scale_dtype == "float32" else 16
        return kinds * scheme.super_bits + -(-kinds * width // scheme.super_group_size)

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns the scales that cover each group, rounded to the nearest code.

        {"scale_codes" (O, G, 1), "super_scale" (O, S, 1)}, and "minimum_codes" and "super_offset" when asymmetric;
        float32.
        """
        grid = grid_of(scheme)
        grouped = to_groups(weight_OI.float(), scheme.group_size)
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        if scheme.sym:
            scale = torch.where(high < -low, low, high) / grid.bounds[0]
        else:
            scale = high / grid.bounds[1] - low / grid.bounds[1]  # each by itself: their difference may be infinite
        super_scale = grid.covering_unit(scale)
        range_ = {"scale_codes": grid.codes_for(scale, super_scale), "super_scale": super_scale}
        if not scheme.sym:
            range_["super_offset"] = grid.covering_unit(-low)
            range_["minimum_codes"] = grid.codes_for(-low, range_["super_offset"])
        return range_

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns the codes and super scales of least weighted squared error; fields as of `minmax_range`.

        Without importance weights count as in llama.cpp, larger ones more (`superblock_search.default_weights`).
        """
        return search_superblocks(weight_OI, scheme, importance)

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros, float32."""
        return {"rounding": torch.zeros_like(to_groups(weight_OI.float(), scheme.group_size))}

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params` through the straight-through estimator."""
        grid = grid_of(scheme)
        scale, minimum = _scale_and_minimum(scheme, range_)
        latent = _latent(weight_OI, scheme, scale, minimum) + params["rounding"]
        levels = torch.clamp(round_ste(latent), *grid.bounds)
        fake = scale * levels if minimum is None else scale * levels - minimum
        return from_groups(fake, weight_OI.shape[1])

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns scale (O, G, 1), residual and in_range (O, G, K)."""
        grid = grid_of(scheme)
        scale, minimum = _scale_and_minimum(scheme, range_)
        latent = _latent(weight_OI, scheme, scale, minimum) + params["rounding"]
        nearest = latent.round()
        return RoundingState(scale, latent - nearest, nearest == nearest.clamp(*grid.bounds))

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns codes and scales; `encode(...).dequantize()` equals `fake_quantize(...)` bit for bit."""
        grid = grid_of(scheme)
        scale, minimum = _scale_and_minimum(scheme, range_)
        latent = offset_by(_latent(weight_OI, scheme, scale, minimum), params)
        codes = (latent.round().clamp(*grid.bounds) - grid.bounds[0]).to(torch.uint8)
        return QuantizedTensor(
            codes=from_groups(codes, weight_OI.shape[1]).contiguous(),
            scale=scale.squeeze(-1),
            zero_point=None,
            scheme=scheme,
            offset=None if minimum is None else -minimum.squeeze(-1),
            super_scale=range_["super_scale"].squeeze(-1),
            super_offset=None if minimum is None else range_["super_offset"].squeeze(-1),
        )


def _scale_and_minimum(scheme: QuantizationScheme, range_: Range) -> tuple[Tensor, Tensor | None]:
    """Returns what a group's levels are multiplied by and what is taken off then, (O, G, 1), as a file gives them."""
    grid, groups = grid_of(scheme), range_["scale_codes"].shape[1]
    scale = grid.expand(range_["super_scale"], groups) * range_["scale_codes"]
    if "minimum_codes" not in range_:
        return scale, None
    return scale, grid.expand(range_["super_offset"], groups) * range_["minimum_codes"]


def _latent(weight_OI: Tensor, scheme: QuantizationScheme, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Returns (O, G, K) weights in units of their scale, above the minimum; a scale of zero divides as if it were 1."""
    grouped = to_groups(weight_OI.float(), scheme.group_size)
    divisor = torch.where(scale.abs() > 0, scale, torch.ones_like(scale))
    return (grouped if minimum is None else grouped + minimum) / divisor


DATA_TYPES.register("int_dq")(SuperBlockDataType())
