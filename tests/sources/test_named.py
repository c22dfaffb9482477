from __future__ import annotations

import json

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.sources.named import open_named
from auto_round.stored_tensors import StoredTensors
from auto_round.streamed_tensors import StreamedTensors


@pytest.fixture
def opened(make_model, tmp_path):
    """Returns make(kind, **config) -> the model and the source of its folder."""

    def make(kind: str = "llama", **config):
        model = make_model(kind, **config)
        model.save_pretrained(tmp_path / kind)
        return model, open_named(tmp_path / kind)

    return make


def test_tensors_go_by_their_names_in_the_checkpoint(opened):
    model, source = opened("mixtral")
    assert isinstance(source.stored, StreamedTensors)
    assert source.is_parallel
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert source.keys()[key] == key
    assert source.outline(key).shape == source.read(key).shape == (32, 64)
    assert torch.equal(source.read("model.norm.weight"), model.model.norm.weight)
    assert source.tensors("model.norm").keys() == {"model.norm.weight"}
    assert (source.fused(), source.fused_experts(), source.ignored()) == ({}, (), set())


def test_experts_in_one_tensor_are_given_as_slices_and_joined_again(opened):
    model, source = opened("gpt_oss")
    module = "model.layers.0.mlp.experts"
    fused = f"{module}.gate_up_proj"
    stored = model.get_parameter(fused).detach()
    slices = source.fused()[fused]
    assert f"{module}.3.up_proj.weight" in slices
    assert not source.keys().keys() & source.fused().keys()
    up = source.read(f"{module}.3.up_proj.weight")
    assert torch.equal(up, stored[3, :, 1::2].t())  # its gate and up projections alternate
    assert source.outline(f"{module}.3.up_proj.weight").shape == up.shape
    pieces = dict(source.pieces(fused, set()))
    assert tuple(pieces) == slices
    assert torch.equal(source.join(fused, pieces), stored)
    assert source.fused_experts() == (module, "model.layers.1.mlp.experts")


def test_a_tied_output_layer_is_the_embedding(opened):
    model, source = opened(tie_word_embeddings=True)
    assert source.structure(None).tied_head
    assert torch.equal(source.tensors("lm_head")["lm_head.weight"], model.model.embed_tokens.weight)


def test_layers_beyond_the_models_count_are_ignored(opened, tmp_path):
    opened()
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    source = open_named(tmp_path / "llama")
    assert source.structure(None).extra_modules == ("model.layers.1",)
    assert all(key.startswith("model.layers.1.") for key in source.ignored())
    assert len(source.ignored()) == 9


def test_a_tensor_is_read_into_memory_of_its_own_unless_it_is_rounded(opened):
    _, source = opened()
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    ((_, kept),) = source.pieces(one, {two})
    ((_, lent),) = source.pieces(two, {two})
    place = lent.data_ptr()
    ((_, again),) = source.pieces(one, {one})
    assert again.data_ptr() == place != kept.data_ptr()
    assert torch.equal(again, kept)


def test_files_are_named_with_their_tensors_in_order(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="50KB")
    source = open_named(tmp_path)
    files = source.files()
    assert list(files) == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert {key for keys in files.values() for key in keys} == source.keys().keys()


def test_lengths_that_limit_samples_are_read_from_the_files(opened, tmp_path):
    _, source = opened()
    assert source.longest() == [64, None]
    (tmp_path / "llama" / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    assert source.longest() == [64, 32]


def test_pickled_weights_are_read_by_one_thread(make_model, tmp_path):
    model = make_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source = open_named(tmp_path)
    assert isinstance(source.stored, StoredTensors)
    assert not source.is_parallel
    assert list(source.files()) == ["weights"]
    assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)


def test_no_model_folder_and_unknown_quantization_are_told(opened, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        open_named(tmp_path)
    opened()
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "novel"}}))
    with pytest.raises(UnsupportedError, match="quantized with novel"):
        open_named(tmp_path / "llama")
