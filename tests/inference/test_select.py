import dataclasses

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.inference.layer import LayerSpec
from auto_round.inference.select import select_backends
from auto_round.schemes import QuantizationScheme

UP = LayerSpec(
    name="model.layers.0.up",
    in_features=256,
    out_features=256,
    scheme=QuantizationScheme(),
    layout="gptq",
    dtype=torch.bfloat16,
)
EIGHT = dataclasses.replace(UP, name="model.layers.0.down", scheme=QuantizationScheme(bits=8))


def test_auto_takes_for_each_layer_the_fastest_that_accepts_it():
    # vs. the plain "torch": a W4 bfloat16 layer on a CPU has something better, an 8-bit layer has not.
    chosen = select_backends([UP, dataclasses.replace(EIGHT, device="cuda", dtype=torch.float32)])
    assert chosen[UP.name].priority > 0
    assert select_backends([UP], "torch")[UP.name].name == "auto_round:torch"


@pytest.mark.parametrize("name", ["torch", "auto_round:torch", "auto_round:torch_zp", "torch_zp"])
def test_a_backend_is_found_by_its_name_and_aliases(name):
    assert select_backends([UP, EIGHT], name)[EIGHT.name].name == "auto_round:torch"


def test_a_named_backend_that_refuses_says_why_for_how_many_layers():
    more = dataclasses.replace(EIGHT, name="model.layers.1.down")
    with pytest.raises(UnsupportedError) as caught:
        select_backends([UP, EIGHT, more], "torch_cpu_int4")
    message = str(caught.value)
    assert message.startswith("backend 'torch_cpu_int4' cannot run 2 of the layers: bits=8 (only 2, 3, 4) ")
    assert "(2 layers, e.g. model.layers.0.down). Use backend='auto'. These can run all layers: " in message
    assert "auto_round:torch" in message


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown backend 'torhc'\. Did you mean 'torch'\? Known: .*auto_round:torch"
    ):
        select_backends([UP], "torhc")


def test_auto_says_why_each_backend_refuses():
    with pytest.raises(
        UnsupportedError, match=r"no backend can run 1 of the layers: .*auto_round:torch: dtype=float64"
    ):
        select_backends([dataclasses.replace(UP, dtype=torch.float64)])
