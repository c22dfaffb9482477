from __future__ import annotations

import pytest

from auto_round.errors import UnsupportedError
from auto_round.sources.method import read_method


def test_blocks_are_read_from_the_config():
    assert read_method({"quant_method": "fp8"}).block == (128, 128)
    assert read_method({"quant_method": "fp8", "weight_block_size": [64, 32]}).block == (64, 32)
    groups = {"group_0": {"weights": {"block_structure": [32, 16]}, "format": "float-quantized"}}
    assert read_method({"quant_method": "compressed-tensors", "config_groups": groups}).block == (32, 16)
    groups = {"group_0": {"weights": {"block_structure": "32x16"}}}
    assert read_method({"quant_method": "compressed-tensors", "config_groups": groups}).block == (32, 16)


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round"])
def test_what_is_said_of_single_layers_is_kept(method):
    assert read_method({"quant_method": method, "bits": 4, "group_size": 64}).layers.defaults["group_size"] == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized with bitsandbytes, which is not read.*fp8.*mxfp4"),
        ({}, "an unnamed method"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'.*pack-quantized"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse weights",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
            "rotated weights",
        ),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "gemv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_refused_by_name(config, reason):
    with pytest.raises(UnsupportedError, match=reason):
        read_method(config)
