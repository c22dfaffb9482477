"""What a checkpoint's `packing_format` says: the layout of its tensors, which may depend on each layer's scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.errors import UnsupportedError, nearest
from auto_round.layouts.by_scheme import compressed_layout
from auto_round.schemes import STATIC_GLOBAL_SCALE, QuantizationScheme, canonical_data_type

# Not in the registry of layouts: 16-bit weights as they are, whose rounding is in their values. The reference writes
# such checkpoints (format "fake") to go with quantized activations.
DENSE = "dense"
COMPRESSED = "llm_compressor"
BY_DATA_TYPE = "by data type"
# packing_format -> layout of integer weights, or one of the above. "auto_round:gptq" and "auto_round:awq" are
# Transformers' names for foreign checkpoints, the former also for those that say nothing.
PACKING_FORMATS = {
    "auto_round": "gptq_zp",
    "auto_round:gptqmodel": "gptq_zp",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_gptq": "gptq",
    "auto_awq": "awq",
    "auto_round:llm_compressor": COMPRESSED,
    "auto_round:fp8_static": BY_DATA_TYPE,
    "auto_round:fp8": BY_DATA_TYPE,
    "auto_round:fake": DENSE,
}
# Releases around 0.6 wrote "auto_round:" and the data type of weights or activations.
DATA_TYPES_AS_PACKING = {"fp", "fp_e5m2", "mx_fp", "nv_fp", STATIC_GLOBAL_SCALE}
GPTQ_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_zp"}


def read_packing(values: Mapping[str, Any], old_packing: str | None = None) -> str:
    """Returns what `PACKING_FORMATS` holds for a quantization_config.

    Args:
        values: the config.
        old_packing: "gptq" or "awq" of releases that wrote it elsewhere.
    Raises:
        UnsupportedError: a packing format, GPTQ or AWQ variant that cannot be loaded.
    """
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", "auto-round")))
    packing = values.get("packing_format")
    if old_packing and packing in (None, "auto_round:gptq"):
        packing = f"auto_round:{old_packing}"
    if packing is None:
        packing = f"auto_round:{method}" if method in ("gptq", "awq") else "auto_round:auto_gptq"
    if canonical_data_type(packing.removeprefix("auto_round:"))[0] in DATA_TYPES_AS_PACKING:
        return BY_DATA_TYPE
    if packing not in PACKING_FORMATS:
        hint = nearest(packing, PACKING_FORMATS)
        raise UnsupportedError(
            f"packing_format '{packing}' cannot be loaded.{hint} Allowed: {', '.join(PACKING_FORMATS)}"
        )
    found = PACKING_FORMATS[packing]
    if found == "awq" and str(values.get("version", "gemm")).lower() != "gemm":
        raise UnsupportedError(f"AWQ version '{values['version']}' cannot be loaded (only gemm)")
    if found == "gptq" and "checkpoint_format" in values:
        form = values["checkpoint_format"]
        if form not in GPTQ_FORMATS:
            known = ", ".join(GPTQ_FORMATS)
            raise UnsupportedError(f"GPTQ checkpoint_format '{form}' cannot be loaded. Allowed: {known}")
        found = GPTQ_FORMATS[form]
    return found


def layout_of(packing: str, scheme: QuantizationScheme) -> str:
    """Returns the name of the layout of a layer with this scheme.

    Args:
        packing: what `read_packing` returned.
    """
    if packing == DENSE:
        return DENSE
    if packing != COMPRESSED:
        if scheme.data_type == "int" and packing != BY_DATA_TYPE:
            return packing
        if scheme.data_type in ("fp", "fp_e5m2"):
            return "fp8_flat"
        if scheme.data_type == "mx_int":
            return "mxint4"
    return compressed_layout(scheme).name
