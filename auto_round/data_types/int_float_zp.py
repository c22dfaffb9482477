"""Integers with a scale and a minimum of their own in each group (GGUF's Q4_1 and Q5_1).

W_hat = scale * clamp(round((W - low) / scale + V), 0, 2**bits - 1) + low, with scale and low rounded to the scheme's
scale dtype. Unlike a zero point, the minimum may lie anywhere, also above zero. Only V is tuned, as with super-blocks
(int_superblock.py says why).
"""

from __future__ import annotations

from torch import Tensor

from auto_round.data_types.affine_search import search_affine
from auto_round.data_types.base import DATA_TYPES, MIN_SCALE, Params, Range, cast_ste
from auto_round.data_types.integer_grid import IntegerGrid, IntegerGridDataType
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import to_groups


class IntFloatMinimumDataType(IntegerGridDataType):
    """The data type "int_float_zp", as auto-round calls it. Stateless."""

    name = "int_float_zp"

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

    def grid(self, scheme: QuantizationScheme, range_: Range, params: Params) -> IntegerGrid:  # noqa: ARG002
        """Returns the levels with scale and minimum as they are stored."""
        scale = cast_ste(range_["scale"], scheme.scale_dtype).clamp(min=MIN_SCALE[scheme.scale_dtype])
        return IntegerGrid(scale, (0, 2**scheme.bits - 1), offset=cast_ste(range_["low"], scheme.scale_dtype))

    def stored(self, grid: IntegerGrid, scheme: QuantizationScheme, range_: Range) -> dict[str, Tensor | None]:  # noqa: ARG002
        """Returns {"zero_point": None, "offset" (O, G) float32}."""
        assert grid.offset is not None
        return {"zero_point": None, "offset": grid.offset.squeeze(-1)}


DATA_TYPES.register("int_float_zp")(IntFloatMinimumDataType())
