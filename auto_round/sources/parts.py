"""Which stored tensors belong together: the codes, scales and zero points of one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

# Tensors of a GPTQ or AWQ weight, beside where "weight" would be.
INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What is put after the name of a weight. The first that a checkpoint has tells that the weight is quantized.
SCALES = ("_scale", "_scale_inv", "_scales")
OTHER_PARTS = ("", "_packed", "_blocks", "_shape", "_zero_point", "_global_scale", "_g_idx")
# Left of the old quantization where the model has no such tensors: ranges of activations and of a key/value cache.
LEFTOVERS = {
    f"{what}_{kind}"
    for what in ("input", "output", "activation", "q", "k", "v", "prob")
    for kind in ("scale", "global_scale", "zero_point", "scale_ub")
}


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized weight in a checkpoint.

    Attributes:
        key: that the weight would have if it were stored in 16 bits.
        parts: local name -> key of a stored tensor. Local names are "qweight" ... for GPTQ and AWQ, else "weight" with
            what follows the key: "weight_scale", "weight_blocks", or "weight" itself.
    """

    key: str
    parts: Mapping[str, str]


def packed_weights(keys: Collection[str]) -> dict[str, PackedWeight]:
    """Returns key of a weight -> its parts, for every quantized weight among the keys of a checkpoint."""
    found: dict[str, PackedWeight] = {}
    for key in keys:
        if key.endswith(".qweight"):
            stem = key.removesuffix("qweight")
            parts = {name: stem + name for name in INTEGER_PARTS if stem + name in keys}
            found[stem + "weight"] = PackedWeight(stem + "weight", parts)
            continue
        suffix = next((end for end in SCALES if key.endswith(end)), None)
        if suffix is None:
            continue
        weight = key.removesuffix(suffix)
        if any(weight + end in keys for end in ("", "_packed", "_blocks")):
            ends = [end for end in (*OTHER_PARTS, suffix) if weight + end in keys]
            found[weight] = PackedWeight(weight, {f"weight{end}": weight + end for end in ends})
    return found


def is_range(key: str) -> bool:
    """Whether a tensor is a range of activations or of a key/value cache, by its name."""
    return key.rpartition(".")[2] in LEFTOVERS
