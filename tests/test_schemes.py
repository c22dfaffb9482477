import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import ConfigError
from auto_round.schemes import (
    PRESET_SCHEMES,
    SCHEME_FIELDS,
    QuantizationScheme,
    check_fields,
    preset_name_to_scheme,
    to_scheme,
)


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [
        ("W4A16", 4, 128),
        ("W2A16", 2, 128),
        ("W3A16", 3, 128),
        ("W8A16", 8, 128),
        ("W2A16G64", 2, 64),
        ("W2A16G32", 2, 32),
        ("W4A16G64", 4, 64),
        ("w4a16", 4, 128),
        (" W4A16 ", 4, 128),
        ("W5A16G256", 5, 256),
    ],
)
def test_a_preset_name_gives_symmetric_integers(name, bits, group_size):
    assert preset_name_to_scheme(name) == QuantizationScheme(bits=bits, group_size=group_size, sym=True)


def test_bf16_is_no_quantization():
    scheme = preset_name_to_scheme("BF16")
    assert not scheme.is_quantized
    assert str(scheme) == "16-bit"


@pytest.mark.parametrize("name", ["W9A16", "W1A16", "W4A16G", "W4A16G-1", "", "nonsense"])
def test_an_unknown_preset_is_refused(name):
    with pytest.raises(ConfigError, match="unknown scheme"):
        preset_name_to_scheme(name)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown scheme 'W4A61'\. Did you mean 'W4A16'\?"):
        preset_name_to_scheme("W4A61")


def test_every_preset_is_found_by_its_own_name():
    for name, scheme in PRESET_SCHEMES.items():
        assert preset_name_to_scheme(name) == scheme


def test_the_defaults_are_those_of_w4a16():
    assert QuantizationScheme() == PRESET_SCHEMES["W4A16"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 0),
        ("bits", 1),
        ("bits", 9),
        ("bits", 15),
        ("bits", 32),
        ("bits", -4),
        ("bits", 4.0),
        ("bits", "4"),
        ("bits", True),
        ("bits", None),
        ("group_size", -2),
        ("group_size", 1.5),
        ("group_size", "128"),
        ("group_size", True),
        ("group_size", None),
        ("sym", 1),
        ("sym", "true"),
        ("sym", None),
        ("scale_dtype", "fp8"),
        ("scale_dtype", None),
        ("act_bits", 0),
        ("act_bits", "8"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_in_the_message(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        QuantizationScheme(**{field: value})


def test_bad_values_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        QuantizationScheme(bits=9, group_size=-5, sym="yes", scale_dtype="fp8")
    for part in ("bits=9", "group_size=-5", "sym='yes'", "scale_dtype='fp8'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("group_size", [-1, 0, 1, 32, 100000])
def test_group_sizes_per_row_per_tensor_and_positive_are_allowed(group_size):
    assert QuantizationScheme(group_size=group_size).group_size == group_size


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("fp16", "float16"),
        ("float16", "float16"),
        ("torch.float16", "float16"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp32", "float32"),
        ("float32", "float32"),
    ],
)
def test_the_scale_dtype_has_one_spelling_inside(given_name, kept):
    assert QuantizationScheme(scale_dtype=given_name).scale_dtype == kept


def test_a_torch_dtype_is_a_scale_dtype():
    import torch

    assert QuantizationScheme(scale_dtype=torch.bfloat16).scale_dtype == "bfloat16"


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'group_sise'\. Did you mean 'group_size'\?"):
        QuantizationScheme.from_dict({"group_sise": 32})


def test_all_unknown_fields_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        check_fields({"bit": 4, "groupsize": 32, "sym": True})
    assert "'bit'" in str(caught.value)
    assert "'groupsize'" in str(caught.value)
    assert "'sym'" not in str(caught.value)


def test_replace_checks_names_and_values():
    assert QuantizationScheme().replace(bits=2, sym=False) == QuantizationScheme(bits=2, sym=False)
    with pytest.raises(ConfigError, match="unknown scheme option"):
        QuantizationScheme().replace(bitts=2)
    with pytest.raises(ConfigError, match="bits=1"):
        QuantizationScheme().replace(bits=1)


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
    group_size=st.sampled_from([-1, 0, 32, 100]),
    sym=st.booleans(),
    scale_dtype=st.sampled_from(["fp16", "bf16", "fp32"]),
    act_bits=st.sampled_from([8, 16]),
)
def test_a_scheme_reads_back_from_its_dictionary(bits, group_size, sym, scale_dtype, act_bits):
    scheme = QuantizationScheme(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype, act_bits=act_bits)
    again = QuantizationScheme.from_dict(scheme.to_dict())
    assert again == scheme
    assert hash(again) == hash(scheme)
    assert tuple(scheme.to_dict()) == SCHEME_FIELDS


def test_a_scheme_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationScheme().bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (QuantizationScheme(), "int4 g128 sym"),
        (QuantizationScheme(bits=2, group_size=-1, sym=False), "int2 per row asym"),
        (QuantizationScheme(bits=8, group_size=0), "int8 per tensor sym"),
        (QuantizationScheme(bits=8, group_size=32, act_bits=8), "int8 g32 sym, activations int8 g32 dynamic"),
    ],
    ids=str,
)
def test_a_scheme_reads_in_words(scheme, text):
    assert str(scheme) == text


def test_to_scheme_takes_names_dictionaries_and_schemes():
    scheme = QuantizationScheme(bits=2, group_size=64)
    assert to_scheme("W2A16G64") == to_scheme({"bits": 2, "group_size": 64}) == to_scheme(scheme) == scheme
    assert to_scheme(scheme) is scheme


@pytest.mark.parametrize("value", [4, None, ["W4A16"]])
def test_to_scheme_refuses_other_types_by_name(value):
    with pytest.raises(ConfigError, match=type(value).__name__):
        to_scheme(value)
