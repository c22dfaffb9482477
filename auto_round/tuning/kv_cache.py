"""Scales for an FP8 key/value cache: the largest keys and values that a block gives on calibration text.

The block runs with a stand-in for the model's cache, which sees keys and values just as a cache would store them,
after rotary embedding and whatever else the family does to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.block import Block
from auto_round.elements import E4M3
from auto_round.errors import UnsupportedError

ARGUMENT = "past_key_values"
KEY_LAYERS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "k_b_proj")


class _PeakRecorder:
    """Has the one method of a cache that attention layers call; keeps magnitudes, returns what it is given."""

    def __init__(self) -> None:
        self.peaks: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_where: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        found = torch.stack([keys.abs().amax(), values.abs().amax()]).float()
        self.peaks.append(found)
        return keys, values


@torch.no_grad()
def cache_scales(
    block: Block, inputs_NTH: Tensor, batches: Sequence[slice], replaced: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns `<attention>.k_scale` and `.v_scale`, (1,) float32: largest magnitude over 448.

    Args:
        inputs_NTH: what the block sees.
        replaced: dequantized weights by full name.
    Raises:
        UnsupportedError: the block takes no cache, or no attention layer in it uses one.
    """
    scales: dict[str, Tensor] = {}
    for name, module in zip(block.names, block.modules, strict=True):
        if ARGUMENT not in inspect.signature(module.forward).parameters:
            raise UnsupportedError(f"{name} takes no {ARGUMENT}: run without static_kv_dtype")
    recorder = _PeakRecorder()
    for piece in batches:
        samples = torch.arange(piece.start, piece.stop)
        block.forward(inputs_NTH[piece].to(block.device), samples, replaced, {ARGUMENT: recorder})
    calls = len(recorder.peaks) // max(len(batches), 1)
    attentions = [attention for n, m in zip(block.names, block.modules, strict=True) for attention in _attentions(n, m)]
    if calls == 0 or calls != len(attentions):
        raise UnsupportedError(f"{block.name} keeps no keys and values in a cache: run without static_kv_dtype")
    for index, attention in enumerate(attentions):
        peaks = torch.stack(recorder.peaks[index::calls]).amax(0).clamp(min=torch.finfo(torch.float32).tiny)
        keys, values = (peaks / E4M3.largest).chunk(2)
        scales |= {f"{attention}.k_scale": keys, f"{attention}.v_scale": values}
    return scales


def _attentions(block: str, module: nn.Module) -> list[str]:
    """Returns the full names of the modules that make keys, in order."""
    names = [name for name, _ in module.named_modules() if name.rpartition(".")[2] in KEY_LAYERS]
    return [f"{block}.{name.rpartition('.')[0]}" for name in names]
