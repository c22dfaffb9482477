from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from auto_round.errors import CheckpointError
from auto_round.shards import ShardWriter
from auto_round.streamed_tensors import StreamedTensors

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.weight": torch.randn(5, 7).to(torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "codes": torch.arange(9, dtype=torch.uint8),
    "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_tensors_are_what_safetensors_wrote(folder):
    stored = StreamedTensors(folder)
    assert stored.keys() == TENSORS.keys()
    assert len(stored) == len(TENSORS)
    for key, tensor in TENSORS.items():
        for found in (stored[key], stored.lent(key)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            raw = [one.reshape(-1).view(torch.uint8) for one in (found, tensor)]
            assert torch.equal(*raw)
        outline = stored.outline(key)
        assert (outline.dtype, outline.shape, outline.is_meta) == (tensor.dtype, tensor.shape, True)


def test_several_files_are_one_folder_in_the_order_of_the_disk(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    values = {f"t{index}": torch.full((10,), float(index)) for index in (3, 1, 2)}
    for key, tensor in values.items():
        writer.add(key, tensor)
    writer.close()
    stored = StreamedTensors(tmp_path)
    assert list(stored) == ["t1", "t3", "t2"]  # safetensors sorts the two that share a file
    files = dict.fromkeys(stored.places[key].file for key in stored)
    assert list(files) == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert all(torch.equal(stored[key], tensor) for key, tensor in values.items())


def test_lent_memory_is_used_again_by_the_same_thread_only(folder):
    stored = StreamedTensors(folder)
    first, own = stored.lent("b.weight"), stored["b.weight"]
    kept = []
    thread = threading.Thread(target=lambda: kept.append(stored.lent("a.weight")))
    thread.start()
    thread.join()
    assert torch.equal(first, TENSORS["b.weight"])
    second = stored.lent("codes")
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(kept[0], TENSORS["a.weight"])
    assert torch.equal(own, TENSORS["b.weight"])


def test_damaged_and_missing_files_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        StreamedTensors(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    stored = StreamedTensors(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends within a"):
        stored["a"]
    save_file({"a": torch.ones(100)}, file)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match="does not hold b"):
        StreamedTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    content = bytearray(file.read_bytes())
    content[10:14] = b"????"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        StreamedTensors(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        StreamedTensors(tmp_path)
