from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from auto_round.checkpoint import CheckpointSource, ModuleSource
from auto_round.extra_tensors import extra_matrices, extra_modules


def test_matrices_that_the_model_does_not_know_are_found_with_the_outermost_module_of_their_own(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(2, 2),
        "model.layers.2.mlp.up_proj.weight": torch.ones(2, 2),
        "model.layers.2.enorm.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.mlp.side.proj.weight": torch.ones(2, 2),
        "table": torch.ones(2, 2),
    }
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), **extra}, file)
    source = CheckpointSource(tmp_path)
    assert extra_matrices(source) == sorted(key for key, tensor in extra.items() if tensor.ndim == 2)
    assert set(extra_modules(source)) == {"model.layers.2", "model.layers.0.mlp.side", "table"}
    assert extra_modules(ModuleSource(model)) == ()
