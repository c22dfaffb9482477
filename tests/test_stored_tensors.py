from __future__ import annotations

import torch
from safetensors.torch import save_file

from auto_round.models.experts import ExpertSlice
from auto_round.stored_tensors import SlicedTensors, StoredTensors


def test_an_outline_has_shape_and_dtype_of_the_tensor(tmp_path):
    tensor = torch.ones(3, 4, dtype=torch.bfloat16)
    save_file({"a.weight": tensor}, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    outline = stored.outline("a.weight")
    assert (outline.shape, outline.dtype, outline.is_meta) == (tensor.shape, tensor.dtype, True)
    assert torch.equal(stored["a.weight"], tensor)
    assert list(stored) == ["a.weight"]


def test_a_key_of_a_slice_gives_its_part_of_the_fused_tensor(tmp_path):
    fused, plain = torch.arange(24.0).reshape(2, 4, 3), torch.ones(2)
    save_file({"experts.gate_up": fused, "norm": plain}, tmp_path / "model.safetensors")
    up = ExpertSlice("1.up.weight", expert=1, part=1, parts=2, interleaved=False, transposed=False)
    sliced = SlicedTensors(StoredTensors(tmp_path), {"experts.1.up.weight": ("experts.gate_up", up)})
    assert torch.equal(sliced.read("experts.1.up.weight"), fused[1, 2:])
    assert torch.equal(sliced.read("norm"), plain)
    for key, tensor in (("experts.1.up.weight", fused[1, 2:]), ("norm", plain)):
        outline = sliced.outline(key)
        assert (outline.shape, outline.dtype, outline.is_meta) == (tensor.shape, tensor.dtype, True)
