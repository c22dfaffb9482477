"""Integers with a float16 scale and minimum."""

from __future__ import annotations

import torch

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import PRESET_SCHEMES

TYPE, Q4_1 = DATA_TYPES["int_float_zp"], PRESET_SCHEMES["GGUF:Q4_1"]


def test_the_ends_of_the_range_have_the_outermost_codes():
    weight = torch.linspace(-1, 2, 32)[None]
    range_ = TYPE.minmax_range(weight, Q4_1)
    encoded = TYPE.encode(weight, Q4_1, range_, TYPE.trainable(weight, Q4_1))
    assert (float(encoded.offset), int(encoded.codes[0, 0]), int(encoded.codes[0, -1])) == (-1.0, 0, 15)
    assert float(encoded.scale) == float(torch.tensor(0.2).half())


def test_offsets_move_codes_and_leave_the_scales():
    weight = torch.linspace(-1, 2, 32)[None]
    range_, params = TYPE.minmax_range(weight, Q4_1), TYPE.trainable(weight, Q4_1)
    assert set(params) == {"rounding"}
    start = TYPE.encode(weight, Q4_1, range_, params)
    down = TYPE.encode(weight, Q4_1, range_, {"rounding": params["rounding"] - 1})
    assert torch.equal(down.codes, start.codes - (start.codes > 0).to(torch.uint8))
    assert torch.equal(down.scale, start.scale)


def test_what_the_type_cannot_be_is_refused():
    assert TYPE.refuses(Q4_1) is None
    assert "sym" in (TYPE.refuses(Q4_1.replace(sym=True)) or "")
    assert "group_size=0" in (TYPE.refuses(Q4_1.replace(group_size=0)) or "")
    assert TYPE.scale_bits(Q4_1) == 32
