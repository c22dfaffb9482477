from __future__ import annotations

import torch
from safetensors.torch import save_file

from auto_round.stored_tensors import StoredTensors


def test_an_outline_has_shape_and_dtype_of_the_tensor(tmp_path):
    tensor = torch.ones(3, 4, dtype=torch.bfloat16)
    save_file({"a.weight": tensor}, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    outline = stored.outline("a.weight")
    assert (outline.shape, outline.dtype, outline.is_meta) == (tensor.shape, tensor.dtype, True)
    assert torch.equal(stored["a.weight"], tensor)
    assert list(stored) == ["a.weight"]
