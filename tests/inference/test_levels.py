import pytest
import torch

from auto_round.elements import E2M1, MXINT4
from auto_round.inference.levels import fp8_levels, pair_levels
from auto_round.layouts import LAYOUTS
from auto_round.schemes import PRESET_SCHEMES
from auto_round.tensors import QuantizedTensor


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_number_is_what_pytorch_says(dtype):
    stored = torch.arange(256, dtype=torch.uint8).view(dtype)
    exact, found = stored.float(), fp8_levels(stored)
    is_number = ~exact.isnan() & ~exact.isinf()
    assert found.dtype == torch.float32
    assert torch.equal(found[is_number], exact[is_number])
    assert torch.equal(found[is_number].signbit(), exact[is_number].signbit())


def test_fp8_numbers_may_have_any_strides():
    stored = torch.randn(6, 8).to(torch.float8_e4m3fn)
    assert torch.equal(fp8_levels(stored[::2]), stored.float()[::2])
    assert torch.equal(fp8_levels(stored.t()), stored.float().t())


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "MXINT4"])
def test_pairs_are_those_that_the_layout_packs(name):
    scheme, layout = PRESET_SCHEMES[name], name.lower()
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    codes[codes == 8] = 0  # -8 of MXINT4, which is not used
    groups = (5, 64 // scheme.group_size)
    whole = torch.tensor(1.0) if name == "NVFP4" else None
    packed = LAYOUTS[layout].pack(QuantizedTensor(codes, torch.ones(groups), None, scheme, global_scale=whole))
    element = MXINT4 if name == "MXINT4" else E2M1
    assert torch.equal(pair_levels(packed["weight_packed"], layout), element.decode(codes))
