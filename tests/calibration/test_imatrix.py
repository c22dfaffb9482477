"""Importance matrices of llama.cpp, by the bytes that its source says, and through the package gguf."""

from __future__ import annotations

import struct

import pytest
import torch

from auto_round.calibration.imatrix import ImportanceEntry, ImportanceMatrix, read_imatrix, write_imatrix
from auto_round.errors import CalibrationError


def matrix() -> ImportanceMatrix:
    """Returns a layer of three channels, and two experts of two channels of which one was never reached."""
    return ImportanceMatrix(
        {
            "blk.0.attn_q.weight": ImportanceEntry(torch.tensor([[512.0, 1024.0, 0.0]]), torch.tensor([512.0])),
            "blk.0.ffn_up_exps.weight": ImportanceEntry(
                torch.tensor([[100.0, 300.0], [0.0, 0.0]]), torch.tensor([200.0, 0.0])
            ),
        },
        chunks=2,
        chunk_size=256,
        datasets=("calib.txt",),
    )


def test_means_are_sums_over_tokens_and_one_where_none_came():
    assert matrix().entries["blk.0.attn_q.weight"].means().tolist() == [[1.0, 2.0, 0.0]]
    assert matrix().entries["blk.0.ffn_up_exps.weight"].means().tolist() == [[0.5, 1.5], [1.0, 1.0]]


def test_the_older_form_is_written_byte_by_byte_as_llama_cpp_does(tmp_path):
    file = tmp_path / "m.dat"
    write_imatrix(file, matrix())
    first, second = b"blk.0.attn_q.weight", b"blk.0.ffn_up_exps.weight"
    expected = struct.pack("<i", 2)
    expected += struct.pack("<i", 19) + first + struct.pack("<ii3f", 2, 3, 2.0, 4.0, 0.0)
    expected += struct.pack("<i", 24) + second + struct.pack("<ii4f", 1, 4, 0.5, 1.5, 1.0, 1.0)
    expected += struct.pack("<ii", 2, 9) + b"calib.txt"
    assert file.read_bytes() == expected


def test_the_older_form_comes_back_as_means(tmp_path):
    write_imatrix(tmp_path / "m.dat", matrix())
    back = read_imatrix(tmp_path / "m.dat")
    assert (back.chunks, back.datasets) == (2, ("calib.txt",))
    assert back.entries["blk.0.attn_q.weight"].means().tolist() == [[1.0, 2.0, 0.0]]
    assert back.entries["blk.0.ffn_up_exps.weight"].means().tolist() == [[0.5, 1.5, 1.0, 1.0]]


def test_an_older_file_may_end_after_its_entries(tmp_path):
    file = tmp_path / "m.dat"
    file.write_bytes(struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", 0, 1, 3.0))
    back = read_imatrix(file)
    assert (back.chunks, back.datasets) == (0, ())
    assert back.entries["x"].means().tolist() == [[3.0]]


def test_the_gguf_form_comes_back_as_it_was(tmp_path):
    pytest.importorskip("gguf")
    write_imatrix(tmp_path / "m.gguf", matrix())
    back = read_imatrix(tmp_path / "m.gguf")
    assert (back.chunks, back.chunk_size, back.datasets) == (2, 256, ("calib.txt",))
    assert set(back.entries) == set(matrix().entries)
    for name, entry in matrix().entries.items():
        assert torch.equal(back.entries[name].sums, entry.sums)
        assert torch.equal(back.entries[name].counts, entry.counts)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0\0", struct.pack("<ii", 1, 100) + b"short", b'{"text": "no matrix"}', b"GGUFxxxx"]
)
def test_another_file_is_refused(tmp_path, content):
    if content.startswith(b"GGUF"):
        pytest.importorskip("gguf")
    file = tmp_path / "other"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match="other"):
        read_imatrix(file)


def test_a_gguf_file_without_sums_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="llama")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CalibrationError, match="llama-imatrix"):
        read_imatrix(tmp_path / "model.gguf")
