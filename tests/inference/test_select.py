import dataclasses

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.inference import select
from auto_round.inference.backends import BACKENDS, all_backends
from auto_round.inference.layer import LayerSpec
from auto_round.inference.select import hint, kernel_for, select_backends
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


def installable(monkeypatch, **fields):
    """Offers a backend for everything whose package is missing."""
    values = {"name": "theirs:fast", "requires": ("no_such_package",), "brings": "kernels", "priority": 99}
    better = dataclasses.replace(BACKENDS["torch"], **{**values, **fields})
    ordered = sorted([better, *all_backends()], key=lambda backend: -backend.rank())
    monkeypatch.setattr(select, "all_backends", lambda: ordered)


def test_a_better_backend_whose_package_is_missing_is_hinted_at(monkeypatch):
    installable(monkeypatch, bits=frozenset({8}), pip="fast-kernels")
    specs = [UP, EIGHT]
    chosen = select_backends(specs)
    assert hint(specs, chosen) == (
        "pip install fast-kernels would bring kernels for 1 of 2 quantized layers "
        f"(theirs:fast instead of {chosen[EIGHT.name].name})"
    )


@pytest.mark.parametrize(
    "fields",
    [{"priority": -1}, {"priority_here": lambda: -1}, {"bits": frozenset({3})}, {"requires": ()}],
    ids=["worse", "worse here", "refuses", "nothing missing"],
)
def test_a_backend_that_would_not_be_chosen_is_not_hinted_at(monkeypatch, fields):
    installable(monkeypatch, **fields)
    chosen = {UP.name: BACKENDS["torch"]}
    assert (hint([UP], chosen) or "").count("theirs") == 0


def test_the_priority_on_this_machine_decides(monkeypatch):
    installable(monkeypatch, requires=(), priority=99, priority_here=lambda: 1)
    assert select_backends([UP])[UP.name].name != "theirs:fast"


def test_the_kernel_of_one_layer_is_that_of_its_backend():
    assert kernel_for(EIGHT, "torch") is BACKENDS["torch"].prepare
    with pytest.raises(UnsupportedError, match=r"cannot run 1 of the layers: bits=8"):
        kernel_for(EIGHT, "torch_cpu_int4")
