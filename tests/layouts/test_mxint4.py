import torch

from auto_round.layouts import LAYOUTS
from auto_round.schemes import PRESET_SCHEMES
from auto_round.tensors import QuantizedTensor

LAYOUT, SCHEME = LAYOUTS["mxint4"], PRESET_SCHEMES["MXINT4"]


def test_pack_then_unpack_is_identity():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 15, (8, 96), generator=rng).to(torch.uint8)
    codes[codes == 8] = 15  # -8 is not used
    scale = torch.exp2(torch.randint(-20, 20, (8, 3), generator=rng).float())
    packed = LAYOUT.pack(QuantizedTensor(codes, scale, None, SCHEME))
    found = LAYOUT.unpack(packed, SCHEME, (8, 96))
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scale, scale)
    specs = {key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in packed.items()}
    assert specs == LAYOUT.specs(SCHEME, (8, 96))


def test_half_bytes_are_a_sign_above_the_magnitude():
    # As the reference reads them: 0.25 times the low three bits, negative if the fourth is set. Scale 2**(129 - 127).
    stored = {"weight_packed": torch.full((1, 16), 0xF3, dtype=torch.uint8)}
    weight = LAYOUT.unpack({**stored, "weight_scale": torch.tensor([[129]], dtype=torch.uint8)}, SCHEME, (1, 32))
    assert weight.dequantize()[0, :4].tolist() == [3.0, -7.0, 3.0, -7.0]


def test_minus_zero_is_zero():
    stored = {"weight_packed": torch.full((1, 16), 0x88, dtype=torch.uint8)}
    weight = LAYOUT.unpack({**stored, "weight_scale": torch.tensor([[127]], dtype=torch.uint8)}, SCHEME, (1, 32))
    assert not weight.dequantize().any()


def test_other_data_types_and_broken_groups_are_refused():
    assert "mx_fp" in LAYOUT.refuses(PRESET_SCHEMES["MXFP4"], (32, 32))
    assert "groups of 32 in 48 inputs" in LAYOUT.refuses(SCHEME, (32, 48))
