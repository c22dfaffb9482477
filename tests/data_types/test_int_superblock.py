"""Plain rounding and tuning on the grid of super-blocks, by hand."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

TYPE = DATA_TYPES["int_dq"]
Q2_K, Q3_K = PRESET_SCHEMES["GGUF:Q2_K"], PRESET_SCHEMES["GGUF:Q3_K"]


@pytest.mark.parametrize(
    ("kind", "bits"), [("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625)]
)
def test_bits_of_a_weight_are_those_of_a_file(kind, bits):
    scheme = PRESET_SCHEMES[f"GGUF:{kind}"]
    assert isinstance(scheme.group_size, int)
    assert scheme.bits + TYPE.scale_bits(scheme) / scheme.group_size == bits


def test_plain_rounding_covers_the_largest_group_and_rounds_the_scales_of_others():
    weight = torch.zeros(1, 256)
    weight[0, 0], weight[0, 1] = -3.0, 6.0  # group 0: scale 3, minimum 3
    weight[0, 16], weight[0, 17] = -1.0, 0.5  # group 1: scale 0.5, 2.5 units of 0.2; minimum 1, 5 units of 0.2
    range_ = TYPE.minmax_range(weight, Q2_K)
    unit = torch.tensor(0.2).half().float()
    assert range_["super_scale"].flatten().tolist() == [float(unit)] == range_["super_offset"].flatten().tolist()
    assert range_["scale_codes"].flatten()[:3].tolist() == [15, 3, 0]
    assert range_["minimum_codes"].flatten()[:3].tolist() == [15, 5, 0]


def test_scales_of_symmetric_groups_are_signed():
    weight = torch.zeros(1, 256)
    weight[0, 0], weight[0, 16] = -4.0, 2.0
    encoded = TYPE.encode(weight, Q3_K, TYPE.minmax_range(weight, Q3_K), TYPE.trainable(weight, Q3_K))
    assert encoded.super_scale.tolist() == [[-1 / 32]]
    assert encoded.scale[0, :3].tolist() == [1.0, -0.5, 0.0]
    assert torch.equal(encoded.dequantize(), weight)


def test_offsets_move_codes_and_leave_the_scales():
    weight = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    range_, params = TYPE.minmax_range(weight, Q2_K), TYPE.trainable(weight, Q2_K)
    assert set(params) == {"rounding"}
    start = TYPE.encode(weight, Q2_K, range_, params)
    up = TYPE.encode(weight, Q2_K, range_, {"rounding": params["rounding"] + 1})
    assert torch.equal(up.codes, (start.codes + 1).clamp(max=3))
    assert torch.equal(up.scale, start.scale)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_size": -1}, "group_size=-1"),
        ({"super_bits": None}, "super_bits=None"),
        ({"super_group_size": 0}, "super_group_size=0"),
        ({"super_bits": 9}, "super_bits=9"),
    ],
)
def test_a_scheme_without_super_blocks_is_refused(changes, reason):
    scheme = QuantizationScheme(**{**Q2_K.to_dict(), **changes})
    assert reason in (TYPE.refuses(scheme) or "")
    assert TYPE.refuses(Q2_K) is None
