"""Which layout of compressed-tensors holds the weights of a scheme; checkpoints do not say it of each layer."""

from __future__ import annotations

from auto_round.layouts.base import LAYOUTS, Layout
from auto_round.schemes import QuantizationScheme

# (data type, bits) of weights that are no integers -> layout.
FLOAT_LAYOUTS = {("fp", 8): "fp8", ("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8", ("nv_fp", 4): "nvfp4"}


def compressed_layout(scheme: QuantizationScheme) -> Layout:
    """Returns the layout that a scheme's weights take; one that refuses them if there is none."""
    if scheme.data_type == "int" and is_int8_product(scheme):
        return LAYOUTS["ct_int8"]
    return LAYOUTS[FLOAT_LAYOUTS.get((scheme.data_type, scheme.bits), "ct_packed")]


def is_int8_product(scheme: QuantizationScheme) -> bool:
    """Whether engines multiply int8 by int8. Weights of fewer bits stay packed, also where activations have 8."""
    activation = scheme.activation
    if activation is None or (activation.data_type, activation.bits) != ("int", 8) or activation.group_size > 0:
        return False
    return scheme.bits == 8 and scheme.sym and scheme.group_size == -1
