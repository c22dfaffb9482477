import pytest

from auto_round.errors import UnsupportedError
from auto_round.inference.packing import BY_DATA_TYPE, COMPRESSED, DENSE, layout_of, read_packing
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme


@pytest.mark.parametrize(
    ("packing_format", "packing"),
    [
        (None, "gptq"),
        ("auto_round", "gptq_zp"),
        ("auto_round:gptqmodel", "gptq_zp"),
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
        ("auto_round:llm_compressor", COMPRESSED),
        ("auto_round:fp8_static", BY_DATA_TYPE),
        ("auto_round:fp8", BY_DATA_TYPE),
        ("auto_round:fp8_e5m2", BY_DATA_TYPE),
        ("auto_round:mx_fp4", BY_DATA_TYPE),
        ("auto_round:nv_fp4_with_static_gs", BY_DATA_TYPE),
        ("auto_round:fake", DENSE),
    ],
)
def test_each_packing_format_is_read(packing_format, packing):
    values = {} if packing_format is None else {"packing_format": packing_format}
    assert read_packing({"quant_method": "auto-round", **values}) == packing


@pytest.mark.parametrize(
    ("packing_format", "scheme", "layout"),
    [
        ("auto_round:auto_gptq", QuantizationScheme(), "gptq"),
        ("auto_round", QuantizationScheme(), "gptq_zp"),
        ("auto_round:auto_gptq", PRESET_SCHEMES["W4A8"], "gptq"),
        ("auto_round:llm_compressor", QuantizationScheme(), "ct_packed"),
        ("auto_round:llm_compressor", PRESET_SCHEMES["INT8_W8A8"], "ct_int8"),
        ("auto_round:llm_compressor", PRESET_SCHEMES["FP8_STATIC"], "fp8"),
        ("auto_round:llm_compressor", PRESET_SCHEMES["MXFP8"], "mxfp8"),
        ("auto_round:llm_compressor", PRESET_SCHEMES["NVFP4"], "nvfp4"),
        ("auto_round:fp8_static", PRESET_SCHEMES["FP8_STATIC"], "fp8_flat"),
        ("auto_round:fp8", PRESET_SCHEMES["FP8_BLOCK"], "fp8_flat"),
        ("auto_round:gptq", PRESET_SCHEMES["FPW8A16"], "fp8_flat"),
        ("auto_round", PRESET_SCHEMES["MXINT4"], "mxint4"),
        ("auto_round:nv_fp4", PRESET_SCHEMES["NVFP4"], "nvfp4"),
        ("auto_round:mx_fp", PRESET_SCHEMES["MXFP4"], "mxfp4"),
        ("auto_round:fake", PRESET_SCHEMES["MXFP4"], DENSE),
    ],
    ids=lambda value: str(value).replace(" ", "_"),
)
def test_the_layout_follows_from_packing_format_and_scheme(packing_format, scheme, layout):
    assert layout_of(read_packing({"packing_format": packing_format}), scheme) == layout


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"packing_format": "auto_round:auto_gptk"},
            r"packing_format 'auto_round:auto_gptk' cannot be loaded\. Did you mean 'auto_round:auto_gptq'\? Allowed: ",
        ),
        (
            {"packing_format": "auto_round:llm_compressor_nvfp4_e5m3"},
            r"packing_format 'auto_round:llm_compressor_nvfp4_e5m3' cannot be loaded\.",
        ),
        ({"quant_method": "awq", "version": "gemv"}, r"AWQ version 'gemv' .* \(only gemm\)"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "GPTQ checkpoint_format 'marlin' cannot be loaded. Allowed: gptq, gptq_v2",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_what_can(values, text):
    with pytest.raises(UnsupportedError, match=text):
        read_packing(values)
