"""Which block type each tensor of a GGUF file takes: llama.cpp's mixtures, as a table of rules.

A mixture such as Q4_K_M gives most tensors one type and a few that errors hurt most a better one. The same file as
`llama-quantize` makes comes out, tensor type by tensor type. Source: llama_tensor_get_type_impl and
tensor_type_fallback in llama.cpp's src/llama-quant.cpp.
"""

from __future__ import annotations

import dataclasses
import re

# Name after "gguf:" -> block type of most tensors, and the number that llama.cpp shows as the file's type.
MIXES: dict[str, tuple[str, int]] = {
    "q2_k_s": ("Q2_K", 21),
    "q2_k": ("Q2_K", 10),
    "q3_k_s": ("Q3_K", 11),
    "q3_k_m": ("Q3_K", 12),
    "q3_k_l": ("Q3_K", 13),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q4_k_s": ("Q4_K", 14),
    "q4_k_m": ("Q4_K", 15),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
    "q5_k_s": ("Q5_K", 16),
    "q5_k_m": ("Q5_K", 17),
    "q6_k": ("Q6_K", 18),
    "q8_0": ("Q8_0", 7),
    "fp16": ("F16", 1),
    "bf16": ("BF16", 32),
}
FLOAT_TYPES = ("F32", "F16", "BF16")
# Block type -> what a row takes that is no multiple of its 256 weights but of 32.
SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
SMALL_BLOCK, SUPER_BLOCK = 32, 256
# Tensors that are never quantized, by a part of their name: small, and the choice of experts hangs on them.
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSize:
    """What the rules look at.

    Attributes:
        layers: number of blocks.
        heads, kv_heads: attention heads, and those of keys and values.
        experts: of each mixture-of-experts layer; 0 for none.
        has_output: whether the output layer has a tensor of its own; else the embedding serves as it.
        value_layers: blocks that have a tensor of values (`attn_v` or `attn_qkv`), in order.
    """

    layers: int
    heads: int
    kv_heads: int
    experts: int
    has_output: bool
    value_layers: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Query heads for each head of keys and values."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes this for a 70B model, whose small values get a better type."""
        return self.layers == 80 and self.heads != self.kv_heads


def is_kept(name: str, dimensions: int) -> bool:
    """Whether a tensor stays in float32 in every mixture: vectors, norms, biases, routers."""
    return dimensions < 2 or not name.endswith("weight") or any(part in name for part in KEPT)


def tensor_type(name: str, width: int, mix: str, size: ModelSize) -> str:
    """Returns the block type of a quantizable tensor.

    Args:
        name: in the file, e.g. "blk.0.attn_v.weight".
        width: length of its rows.
        mix: key of MIXES.
    """
    base = MIXES[mix][0]
    if base in FLOAT_TYPES:
        return base
    return fitting_type(_wanted(name, width, mix, base, size), width)


def fitting_type(wanted: str, width: int) -> str:
    """Returns the type itself, or what a row takes whose length it does not divide."""
    if width % block_size(wanted) == 0:
        return wanted
    smaller = SMALLER_BLOCKS.get(wanted, wanted)
    return smaller if width % block_size(smaller) == 0 else "F16"


def block_size(block_type: str) -> int:
    """Returns the weights of a block."""
    if block_type in FLOAT_TYPES:
        return 1
    return SUPER_BLOCK if block_type.endswith("_K") else SMALL_BLOCK


def _wanted(name: str, width: int, mix: str, base: str, size: ModelSize) -> str:
    """Returns what the mixture asks for, whatever the row's length."""
    if name == "output.weight" or (name == "token_embd.weight" and not size.has_output):
        if width % block_size(base):
            return "Q8_0"
        return base if base == "Q8_0" else "Q6_K"
    found = re.match(r"blk\.(\d+)\.(\w+)\.", name)
    if found is None:
        return base
    layer, part = int(found[1]), found[2]
    if part in ("attn_v", "attn_qkv", "attn_kv_b"):
        return _values(layer, mix, base, size)
    if part == "attn_k" and size.experts == 8:
        return "Q8_0"
    if part.startswith("ffn_down"):
        return _down(layer, mix, base, size.layers)
    if part == "attn_output":
        return _attention_output(mix, base, size.experts)
    return base


def _values(layer: int, mix: str, base: str, size: ModelSize) -> str:
    index, count = size.value_layers.index(layer), len(size.value_layers)
    wanted = {
        "q2_k": "Q4_K" if size.shared >= 4 else "Q3_K",
        "q2_k_s": "Q4_K" if size.shared >= 4 else base,
        "q3_k_m": "Q5_K" if index < 2 else "Q4_K",
        "q3_k_l": "Q5_K",
        "q4_k_s": "Q5_K" if index < 4 else base,
        "q4_k_m": "Q6_K" if _more_bits(index, count) else base,
        "q5_k_m": "Q6_K" if _more_bits(index, count) else base,
    }.get(mix, base)
    if size.is_70b and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return "Q8_0" if size.experts == 8 else wanted


def _down(layer: int, mix: str, base: str, layers: int) -> str:
    return {
        "q2_k": "Q3_K",
        "q2_k_s": "Q4_K" if layer < layers // 8 else base,
        "q3_k_m": "Q5_K" if layer < layers // 16 else "Q4_K",
        "q3_k_l": "Q5_K",
        "q4_k_s": "Q5_K" if layer < layers // 8 else base,
        "q4_k_m": "Q6_K" if _more_bits(layer, layers) else base,
        "q5_k_m": "Q6_K" if _more_bits(layer, layers) else base,
    }.get(mix, base)


def _attention_output(mix: str, base: str, experts: int) -> str:
    if experts == 8:
        return "Q5_K" if mix in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else base
    return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(mix, base)


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among the first and last eighth, or every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
