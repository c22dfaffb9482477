import re

import pytest

from auto_round.layouts.by_scheme import compressed_layout
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

INT8 = PRESET_SCHEMES["INT8_W8A8"]


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (PRESET_SCHEMES["FP8_STATIC"], "fp8"),
        (PRESET_SCHEMES["FP8_BLOCK"], "fp8"),
        (PRESET_SCHEMES["FPW8A16"], "fp8"),
        (PRESET_SCHEMES["MXFP4"], "mxfp4"),
        (PRESET_SCHEMES["MXFP8"], "mxfp8"),
        (PRESET_SCHEMES["NVFP4"], "nvfp4"),
        (INT8, "ct_int8"),
        (INT8.replace(act_group_size=0, act_dynamic=False), "ct_int8"),
        (INT8.replace(group_size=128), "ct_packed"),
        (INT8.replace(act_group_size=128), "ct_packed"),
        (INT8.replace(sym=False), "ct_packed"),
        (PRESET_SCHEMES["W4A8"], "ct_packed"),
        (PRESET_SCHEMES["W8A16"], "ct_packed"),
        (QuantizationScheme(bits=3, sym=False), "ct_packed"),
    ],
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_the_layout_is_the_one_compressed_tensors_has_for_such_weights(scheme, layout):
    assert compressed_layout(scheme).name == layout


@pytest.mark.parametrize("name", ["MXFP6", "MXINT8"])
def test_what_has_no_layout_gets_one_that_refuses_it(name):
    scheme = PRESET_SCHEMES[name]
    assert re.match("(data_type|bits)=", compressed_layout(scheme).refuses(scheme, (128, 128)))
