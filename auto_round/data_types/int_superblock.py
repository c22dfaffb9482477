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

from auto_round.data_types.base import DATA_TYPES, Params, Range
from auto_round.data_types.integer_grid import IntegerGrid, IntegerGridDataType
from auto_round.data_types.superblock_search import grid_of, search_superblocks
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import to_groups


class SuperBlockDataType(IntegerGridDataType):
    """The data type "int_dq". Stateless."""

    name = "int_dq"

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

    def grid(self, scheme: QuantizationScheme, range_: Range, params: Params) -> IntegerGrid:  # noqa: ARG002
        """Returns the levels of each group, as a file's codes and super scales give them."""
        codes, groups = grid_of(scheme), range_["scale_codes"].shape[1]
        scale = codes.expand(range_["super_scale"], groups) * range_["scale_codes"]
        if scheme.sym:
            return IntegerGrid(scale, codes.bounds)
        minimum = codes.expand(range_["super_offset"], groups) * range_["minimum_codes"]
        return IntegerGrid(scale, codes.bounds, offset=-minimum)

    def stored(self, grid: IntegerGrid, scheme: QuantizationScheme, range_: Range) -> dict[str, Tensor | None]:
        """Returns {"zero_point": None, "super_scale" (O, S)}, and when asymmetric "offset" (O, G), "super_offset"."""
        fields: dict[str, Tensor | None] = {"zero_point": None, "super_scale": range_["super_scale"].squeeze(-1)}
        if not scheme.sym:
            assert grid.offset is not None
            fields |= {"offset": grid.offset.squeeze(-1), "super_offset": range_["super_offset"].squeeze(-1)}
        return fields


DATA_TYPES.register("int_dq")(SuperBlockDataType())
