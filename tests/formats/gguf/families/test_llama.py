"""Rotated rows, and Llama 3's factors, against Transformers' own."""

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from auto_round.formats.gguf.families.base import llama3_factors
from auto_round.formats.gguf.families.llama import neighbours


def test_halves_of_a_head_become_neighbours():
    rows = torch.arange(12).reshape(12, 1)
    assert neighbours(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_packed_rows_go_the_same_way():
    packed = torch.arange(24, dtype=torch.uint8).reshape(8, 3)
    assert torch.equal(neighbours(packed, 1)[:, 0], neighbours(packed[:, :1].float(), 1)[:, 0].byte())


def test_llama3_factors_divide_the_frequencies_as_transformers_does():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    factors = llama3_factors(config.to_dict())["rope_freqs.weight"]
    torch.testing.assert_close(plain / factors, frequencies)
    assert factors[0] == 1
    assert factors[-1] == 8
