from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from auto_round import shards
from auto_round.errors import CheckpointError
from auto_round.shards import INDEX_NAME, ShardWriter, clear_weights

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "words": torch.arange(40, dtype=torch.int32).reshape(4, 10),
    "scalar": torch.tensor(2.5),
    "view": torch.randn(6, 8)[2:4],
    "float": torch.randn(7, 4),
    "empty": torch.empty(0, 4),
}


def write(folder, limit=10**9):
    writer = ShardWriter(folder, limit)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()


@pytest.fixture(params=[1 << 26, 1], ids=["collected", "streamed"])
def way(request, monkeypatch):
    """Writes every shard in one of the two ways."""
    monkeypatch.setattr(shards, "STREAMED_FROM", request.param)
    return request.param


def test_safetensors_reads_back_what_was_written(way, tmp_path):
    write(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_shards_stay_below_the_limit_and_the_index_names_them(way, tmp_path):
    write(tmp_path, limit=160)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(tmp_path / file)
        assert sum(t.numel() * t.element_size() for t in held.values()) <= 160
        assert all(index["weight_map"][name] == file for name in held)


def test_the_same_tensors_give_the_same_bytes(way, tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_others_may_read_the_files_as_the_umask_says(way, tmp_path):
    write(tmp_path)
    expected = (tmp_path / "plain").open("w").close() or (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == stat.S_IMODE(expected)


def test_a_header_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "STREAMED_FROM", 1)
    monkeypatch.setattr(shards, "HEADER_ROOM", 64)
    with pytest.raises(CheckpointError, match="--max_shard_size"):
        write(tmp_path)


def test_weights_of_an_earlier_export_are_removed(tmp_path):
    write(tmp_path, limit=160)
    (tmp_path / "config.json").write_text("{}")
    clear_weights(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
