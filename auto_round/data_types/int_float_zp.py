"""Integers with a scale and a minimum of their own in each group (GGUF's Q4_1 and Q5_1).

W_hat = scale * clamp(round((W - low) / scale + V), 0, 2**bits - 1) + low, with scale and low rounded to the scheme's
scale dtype. Unlike a zero point, the minimum may lie anywhere, also above zero. Only V is tuned, as with super-blocks
(int_superblock.py says why).
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.data_types.affine_search import search_affine
from auto_round.data_types.base import (
    DATA_TYPES,
    MIN_SCALE,
    Params,
    Range,
    RoundingState,
    cast_ste,
    offset_by,
    round_ste,
    to_codes,
)
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import QuantizedTensor, from_groups, to_groups


class IntFloatMinimumDataType:
    """The data type "int_float_zp", as auto-round calls it. Stateless."""

    name = "int_float_zp"
    has_tensor_scale = False

    def refuses(self, scheme: QuantizationScheme) -> str | None:
        """Returns a reason for symmetric schemes and for groups that are not of one row."""
        if scheme.sym:
            return "sym=True (only asymmetric)"
        if not isinstance(scheme.group_size, int) or scheme.group_size == 0:
            return f"group_size={scheme.group_size} (a number, or -1)"
        return None

    def scale_bits(self, scheme: QuantizationScheme) -> int:
        """Returns the bits of a scale and a minimum."""
        return 64 if scheme.scale_dtype == "float32" else 32

    def minmax_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns {"scale", "low"}, each (O, G, 1) float32: the smallest weight has code 0, the largest the top one."""
        top = 2**scheme.bits - 1
        grouped = to_groups(weight_OI.float(), scheme.group_size)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        return {"scale": high / top - low / top, "low": low}  # each by itself: their difference may be infinite

    def search_range(
        self,
        weight_OI: Tensor,
        scheme: QuantizationScheme,
        importance: Tensor | None,
        tensor_peak: Tensor | None = None,  # noqa: ARG002
    ) -> Range:
        """Returns the scale and minimum of least weighted squared error."""
        return search_affine(weight_OI, scheme, importance)

    def trainable(self, weight_OI: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
        """Returns rounding (O, G, K) zeros, float32."""
        return {"rounding": torch.zeros_like(to_groups(weight_OI.float(), scheme.group_size))}

    def fake_quantize(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> Tensor:
        """Returns (O, I) float32, differentiable in `params` through the straight-through estimator."""
        scale, low = _scale_and_low(scheme, range_)
        latent = (to_groups(weight_OI.float(), scheme.group_size) - low) / scale + params["rounding"]
        codes = torch.clamp(round_ste(latent), 0, 2**scheme.bits - 1)
        return from_groups(scale * codes + low, weight_OI.shape[1])

    @torch.no_grad()
    def rounding_state(
        self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params
    ) -> RoundingState:
        """Returns scale (O, G, 1), residual and in_range (O, G, K)."""
        scale, low = _scale_and_low(scheme, range_)
        latent = (to_groups(weight_OI.float(), scheme.group_size) - low) / scale + params["rounding"]
        nearest = latent.round()
        return RoundingState(scale, latent - nearest, (nearest >= 0) & (nearest <= 2**scheme.bits - 1))

    @torch.no_grad()
    def encode(self, weight_OI: Tensor, scheme: QuantizationScheme, range_: Range, params: Params) -> QuantizedTensor:
        """Returns codes and scales; `encode(...).dequantize()` equals `fake_quantize(...)` bit for bit."""
        scale, low = _scale_and_low(scheme, range_)
        latent = offset_by((to_groups(weight_OI.float(), scheme.group_size) - low) / scale, params)
        codes = to_codes(latent, torch.zeros_like(low), scheme.bits)
        codes = from_groups(codes, weight_OI.shape[1]).contiguous()
        return QuantizedTensor(codes, scale.squeeze(-1), None, scheme, offset=low.squeeze(-1))


def _scale_and_low(scheme: QuantizationScheme, range_: Range) -> tuple[Tensor, Tensor]:
    """Returns scale and minimum, (O, G, 1) each, as they are stored."""
    scale = cast_ste(range_["scale"], scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])
    return scale, cast_ste(range_["low"], scheme.scale_dtype)


DATA_TYPES.register("int_float_zp")(IntFloatMinimumDataType())
