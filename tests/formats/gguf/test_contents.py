"""The tensors of a file: names, shapes and order, for every family."""

import pytest
import torch

from auto_round.checkpoint import CheckpointSource
from auto_round.formats.gguf.contents import contents_of
from auto_round.models import discover

from .conftest import FAMILIES

pytest.importorskip("gguf")


def contents(folder):
    source = CheckpointSource(folder)
    return source, contents_of(source, discover(source.model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_has_a_place(save_model, family):
    source, found = contents(save_model(family))
    placed = {part.key for tensor in found.tensors for part in tensor.parts}
    assert placed | found.dropped.keys() == source.keys().keys()
    names = [tensor.name for tensor in found.tensors]
    assert len(set(names)) == len(names)
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert blocks == sorted(blocks)


def test_experts_are_stacked_in_order(save_model):
    _, found = contents(save_model("mixtral"))
    tensor = next(tensor for tensor in found.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    assert tensor.shape == (4, 256, 512)
    assert [part.key.split(".")[5] for part in tensor.parts] == ["0", "1", "2", "3"]


def test_latent_attention_is_split_by_head(save_model):
    _, found = contents(save_model("deepseek-v3"))
    shapes = {tensor.name: tensor.shape for tensor in found.tensors}
    assert shapes["blk.0.attn_k_b.weight"] == (4, 256, 64)
    assert shapes["blk.0.attn_v_b.weight"] == (4, 64, 256)


def test_a_tied_output_layer_that_is_stored_is_dropped(save_model):
    from safetensors.torch import load_file, save_file

    folder = save_model("llama-tied")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    _, found = contents(folder)
    assert found.dropped == {"lm_head.weight": "tied"}
    assert not any(tensor.name == "output.weight" for tensor in found.tensors)


def test_tensors_of_no_part_of_the_model_are_told(save_model):
    from safetensors.torch import load_file, save_file

    folder = save_model()
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert set(contents(folder)[1].dropped.values()) == {"no part of the model"}
