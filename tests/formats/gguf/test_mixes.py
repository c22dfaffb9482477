"""Which tensor takes which type: rules worked by hand from llama.cpp's, and its own files."""

import dataclasses
import re

import pytest

from auto_round.formats.gguf.mixes import MIXES, ModelSize, fitting_type, is_kept, tensor_type

SMALL = ModelSize(layers=16, heads=8, kv_heads=4, experts=0, has_output=True, value_layers=tuple(range(16)))


def types(part: str, mix: str, **changes) -> str:
    """Returns the last letters of the types of all layers, one after the other, e.g. "4446"."""
    size = dataclasses.replace(SMALL, **changes)
    return "".join(tensor_type(f"blk.{n}.{part}.weight", 512, mix, size)[1] for n in range(size.layers))


@pytest.mark.parametrize(
    ("part", "mix", "changes", "expected"),
    [
        # The first and last eighth (0, 1, 14, 15), and every third between, from the fifth on.
        ("attn_v", "q4_k_m", {}, "6644644644644666"),
        ("ffn_down", "q4_k_m", {}, "6644644644644666"),
        ("ffn_down", "q5_k_m", {}, "6655655655655666"),
        ("attn_v", "q4_k_s", {}, "5555" + "4" * 12),
        ("ffn_down", "q4_k_s", {}, "55" + "4" * 14),
        ("attn_v", "q3_k_m", {}, "55" + "4" * 14),
        ("ffn_down", "q3_k_m", {}, "5" + "4" * 15),
        ("attn_output", "q3_k_m", {}, "4" * 16),
        ("attn_output", "q3_k_l", {}, "5" * 16),
        ("attn_v", "q2_k", {}, "3" * 16),
        ("attn_v", "q2_k", {"kv_heads": 2}, "4" * 16),
        ("attn_v", "q2_k_s", {}, "2" * 16),
        ("attn_v", "q2_k_s", {"kv_heads": 2}, "4" * 16),
        ("ffn_down", "q2_k_s", {}, "44" + "2" * 14),
        ("ffn_down", "q2_k", {}, "3" * 16),
        ("attn_q", "q4_k_m", {}, "4" * 16),
        ("ffn_gate", "q2_k", {}, "2" * 16),
        ("ffn_down", "q4_0", {}, "4" * 16),
        ("attn_v", "q6_k", {}, "6" * 16),
        # Eight experts: keys and values are small beside them.
        ("attn_v", "q4_k_m", {"experts": 8}, "8" * 16),
        ("attn_k", "q4_0", {"experts": 8}, "8" * 16),
        ("attn_output", "q4_k_s", {"experts": 8}, "5" * 16),
        ("attn_output", "q2_k_s", {"experts": 8}, "2" * 16),
        ("ffn_down_exps", "q4_k_m", {"experts": 4}, "6644644644644666"),
        ("ffn_down_shexp", "q3_k_l", {}, "5" * 16),
    ],
)
def test_layers_take_the_types_of_llama_cpp(part, mix, changes, expected):
    assert types(part, mix, **changes) == expected


def test_a_70b_model_gets_better_values():
    changes = {"layers": 80, "heads": 64, "kv_heads": 8, "value_layers": tuple(range(80))}
    assert set(types("attn_v", "q3_k_s", **changes)) == {"5"}
    assert set(types("attn_v", "q4_k_m", **changes)) == {"5", "6"}


@pytest.mark.parametrize(
    ("mix", "expected"), [("q4_k_m", "Q6_K"), ("q2_k", "Q6_K"), ("q4_0", "Q6_K"), ("q8_0", "Q8_0")]
)
def test_the_output_layer_takes_more_bits_and_the_embedding_where_it_serves_as_one(mix, expected):
    assert tensor_type("output.weight", 512, mix, SMALL) == expected
    tied = dataclasses.replace(SMALL, has_output=False)
    assert tensor_type("token_embd.weight", 512, mix, tied) == expected
    assert tensor_type("token_embd.weight", 512, mix, SMALL) == MIXES[mix][0]


def test_an_output_layer_of_another_width_takes_eight_bits():
    assert tensor_type("output.weight", 96, "q4_k_m", SMALL) == "Q8_0"
    assert tensor_type("output.weight", 40, "q4_k_m", SMALL) == "F16"


@pytest.mark.parametrize(
    ("wanted", "narrow"), [("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")]
)
def test_rows_that_256_does_not_divide_take_blocks_of_32(wanted, narrow):
    assert [fitting_type(wanted, width) for width in (512, 96, 40)] == [wanted, narrow, "F16"]


def test_vectors_norms_and_routers_are_kept():
    assert is_kept("blk.0.attn_norm.weight", 1)
    assert is_kept("blk.0.ffn_gate_inp.weight", 2)
    assert is_kept("blk.0.ffn_gate_exps.bias", 2)
    assert not is_kept("blk.0.attn_q.weight", 2)


def test_every_mixture_has_a_file_type_of_its_own():
    numbers = [number for _, number in MIXES.values()]
    assert len(set(numbers)) == len(MIXES) == 17


@pytest.mark.parametrize("mix", MIXES)
def test_file_types_are_those_of_the_gguf_package(mix):
    gguf = pytest.importorskip("gguf")
    name = {"fp16": "MOSTLY_F16"}.get(mix, f"MOSTLY_{mix.upper()}")
    assert gguf.LlamaFileType[name] == MIXES[mix][1]
    assert re.fullmatch(r"[A-Z0-9_]+", MIXES[mix][0])
    assert MIXES[mix][0] in gguf.GGMLQuantizationType.__members__
