import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.formats.written import TensorSpec, WrittenCheckpoint, listed
from auto_round.shards import INDEX_NAME, ShardWriter

TENSORS = {
    "a": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.zeros(2, 2, dtype=torch.float16),
    "d": torch.tensor(3.0),
}


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with the tensors in two files."""
    writer = ShardWriter(tmp_path, 50)
    for key, tensor in TENSORS.items():
        writer.add(key, tensor)
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    return tmp_path


def change_index(folder, change) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def file_of(folder, key):
    return folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][key]


def test_headers_and_tensors_are_those_that_were_written(folder):
    written = WrittenCheckpoint(folder)
    assert written.problems == []
    assert written.specs == {key: TensorSpec.of(tensor) for key, tensor in TENSORS.items()}
    assert written.specs["a"] == TensorSpec((3, 4), "int32")
    assert str(written.specs["b"]) == "bfloat16 [5]"
    for key, tensor in TENSORS.items():
        assert torch.equal(written.read(key), tensor)


def test_one_file_needs_no_index(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert WrittenCheckpoint(tmp_path).problems == []


@pytest.mark.parametrize("names", [[], ["model-00001-of-00001.safetensors"], ["model.safetensors", "more.safetensors"]])
def test_other_files_without_an_index_are_a_problem(names, tmp_path):
    for number, name in enumerate(names):
        save_file({str(number): torch.ones(1)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert WrittenCheckpoint(tmp_path).problems == [
        f"without {INDEX_NAME} all weights must be in model.safetensors, not in {names}"
    ]


def test_a_tensor_in_another_file_than_the_index_names_is_a_problem(folder):
    other = file_of(folder, "a").name
    assert file_of(folder, "d").name != other
    change_index(folder, lambda index: index["weight_map"].update(d=other))
    assert WrittenCheckpoint(folder).problems == ["tensors that are not in the file that the index names: d"]


def test_a_tensor_that_is_nowhere_is_a_problem(folder):
    name = file_of(folder, "a").name
    change_index(folder, lambda index: index["weight_map"].update(e=name))
    assert WrittenCheckpoint(folder).problems == ["tensors that are not in the file that the index names: e"]


def test_a_tensor_in_two_files_is_a_problem(folder):
    first, last = file_of(folder, "a"), file_of(folder, "d")
    save_file({**load_file(last), "a": TENSORS["a"]}, last)
    assert f"a is both in {first.name} and in {last.name}" in WrittenCheckpoint(folder).problems


def test_a_file_that_the_index_does_not_name_is_a_problem(folder):
    save_file({"e": torch.ones(1)}, folder / "left.safetensors")
    problems = WrittenCheckpoint(folder).problems
    assert "files that the index does not name: left.safetensors" in problems
    assert "tensors that the index lacks: e" in problems


def test_a_wrong_total_size_is_a_problem(folder):
    change_index(folder, lambda index: index["metadata"].update(total_size=71))
    assert WrittenCheckpoint(folder).problems == [f"{INDEX_NAME}: total_size 71, but the tensors have 70 bytes"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=["empty", "no-header", "in-the-header", "a-byte-short"])
def test_a_file_that_was_cut_off_is_a_problem(keep, folder):
    file = file_of(folder, "a")
    file.write_bytes(file.read_bytes()[:keep])
    first = WrittenCheckpoint(folder).problems[0]
    assert first.startswith(f"{file.name} cannot be read: ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}'])
def test_an_index_that_is_none_is_a_problem(text, folder):
    (folder / INDEX_NAME).write_text(text)
    (problem,) = WrittenCheckpoint(folder).problems
    assert problem.startswith(f"{INDEX_NAME} is no index of weights: ")


@pytest.mark.parametrize("name", ["config.json", "quantization_config.json"])
def test_a_config_that_cannot_be_read_is_a_problem(name, folder):
    (folder / name).write_text('{"bits": ')
    (problem,) = WrittenCheckpoint(folder).problems
    assert problem.startswith(f"{name} cannot be read: ")


def test_a_missing_config_is_a_problem(folder):
    (folder / "config.json").unlink()
    (problem,) = WrittenCheckpoint(folder).problems
    assert problem.startswith("config.json cannot be read: ")


def test_long_lists_are_cut():
    assert listed("missing", []) == []
    assert listed("missing", {"b", "a"}) == ["missing: a, b"]
    assert listed("missing", "gfedcba") == ["missing: a, b, c, d, e and 2 more"]
