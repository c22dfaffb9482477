"""Scales of an FP8 key/value cache: what the cache would store, over 448."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from auto_round.errors import UnsupportedError
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.kv_cache import cache_scales

SCHEME = QuantizationScheme(bits=4, group_size=32)


def test_scales_are_the_largest_magnitudes_that_a_cache_stores(make_task, make_model):
    model = make_model("qwen3")
    task = make_task(SCHEME, model=model)
    found = cache_scales(task.block, task.inputs, task.batches, {})
    stored = DynamicCache()
    for piece in task.batches:
        one = DynamicCache()
        task.block.forward(task.inputs[piece], torch.arange(piece.start, piece.stop), None, {"past_key_values": one})
        stored.update(
            one.layers[0].keys.abs().amax()[None, None, None, None],
            one.layers[0].values.abs().amax()[None, None, None, None],
            0,
        )
    keys, values = stored.layers[0].keys.max(), stored.layers[0].values.max()
    name = "model.layers.0.self_attn"
    assert set(found) == {f"{name}.k_scale", f"{name}.v_scale"}
    assert torch.equal(found[f"{name}.k_scale"], keys.reshape(1) / 448)
    assert torch.equal(found[f"{name}.v_scale"], values.reshape(1) / 448)


def test_a_block_without_a_cache_is_refused(make_task):
    task = make_task(SCHEME)
    module = torch.nn.Linear(64, 64)
    object.__setattr__(task.block, "modules", (module,))
    with pytest.raises(UnsupportedError, match="takes no past_key_values"):
        cache_scales(task.block, task.inputs, task.batches, {})
