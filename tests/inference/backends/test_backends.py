"""The suite that every backend in the registry joins by being registered: it keeps what it declares."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from auto_round.inference.backends import BACKENDS, all_backends, why_not
from auto_round.inference.layer import LayerSpec
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme

MEANING = "auto_round:torch"
# Of ||y - y_exact|| / ||y_exact||. The meaning itself has one rounding of weights and one of sums to the dtype, at most
# eps/2 each: 0.008 in bfloat16. Kernels may round scales once more, or activations to 8 bits (0.006, docs/peers.md).
TOLERANCE = {torch.bfloat16: 0.012, torch.float16: 0.01, torch.float32: 0.01}


def device_of(backend) -> str:
    here = {"cpu"} | ({torch.accelerator.current_accelerator().type} if torch.accelerator.is_available() else set())
    devices = sorted(backend.devices & here)
    if not devices:
        pytest.skip(f"needs one of {sorted(backend.devices)}")
    return devices[0]


def declared():
    for backend in all_backends():
        for layout in sorted(backend.layouts):
            for bits in sorted(backend.bits):
                for group_size in sorted(backend.group_sizes or (-1, 32, 128)):
                    for sym in sorted(backend.sym):
                        scheme = QuantizationScheme(bits=bits, group_size=group_size, sym=sym)
                        if LAYOUTS[layout].refuses(scheme, (256, 256)) is None:
                            yield pytest.param(backend, layout, scheme, id=f"{backend.name}-{layout}-{scheme}")


def spec_of(backend, layout, scheme, dtype, **fields):
    base = {"name": "up", "in_features": 256, "out_features": 128, "bias": True, "device": device_of(backend)}
    return LayerSpec(**{**base, "layout": layout, "scheme": scheme, "dtype": dtype, **fields})


# Few and many tokens, as kernels have several ways.
TOKENS = (3, 7, 20, 70)


def assert_computes(backend, case, tokens=TOKENS):
    dtype, device = case.layer.spec.dtype, case.layer.spec.device
    bias = None if case.bias is None else case.bias.to(dtype)
    case.layer.to(device)  # before kernels are made: they prepare their weights for a device
    case.ready()
    for count in tokens:
        x = torch.randn(2, count, case.layer.in_features, dtype=dtype)
        with torch.no_grad():
            y = case.layer(x.to(device)).cpu()
        assert (y.shape, y.dtype) == ((2, count, case.layer.out_features), dtype)
        if backend.name == MEANING and device == "cpu":
            assert torch.equal(y, F.linear(x, case.weight.to(dtype).contiguous(), bias))
        exact = F.linear(x.float(), case.weight, None if bias is None else bias.float())
        assert float((y.float() - exact).norm() / exact.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("backend", "layout", "scheme"), list(declared()))
def test_output_is_the_torch_meaning_for_each_declared_scheme(make_case, backend, layout, scheme):
    for dtype in sorted(backend.dtypes, key=str):
        spec = spec_of(backend, layout, scheme, dtype, in_features=max(256, scheme.group_size))
        if why_not(backend, spec) is not None:
            pytest.skip(why_not(backend, spec))
        assert_computes(backend, make_case(spec, backend.name))


@pytest.mark.parametrize("backend", all_backends(), ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", [(172, 352), (352, 172), (16, 160), (43, 65)], ids=str)
def test_odd_shapes_are_computed_or_refused(make_case, backend, shape):
    for layout in sorted(backend.layouts):
        for bits in sorted(backend.bits):
            scheme = QuantizationScheme(bits=bits, group_size=32, sym=min(backend.sym))
            out_features, in_features = shape
            fields = {"in_features": in_features, "out_features": out_features}
            spec = spec_of(backend, layout, scheme, max(backend.dtypes, key=str), **fields)
            if LAYOUTS[layout].refuses(scheme, shape) is None and why_not(backend, spec) is None:
                assert_computes(backend, make_case(spec, backend.name), tokens=(2,))


@pytest.mark.parametrize("backend", [b for b in all_backends() if b.act_order], ids=lambda backend: backend.name)
@pytest.mark.parametrize("bits", [3, 4])
def test_groups_out_of_order_are_honoured(make_case, backend, bits):
    if bits not in backend.bits:
        pytest.skip("not declared")
    scheme = QuantizationScheme(bits=bits, group_size=64, sym=False)
    for dtype in sorted(backend.dtypes, key=str):
        spec = spec_of(backend, "gptq", scheme, dtype, group_index=True, act_order=True)
        if why_not(backend, spec) is not None:
            pytest.skip(why_not(backend, spec))
        assert_computes(backend, make_case(spec, backend.name, shuffled=True), tokens=(3,))


@pytest.mark.parametrize("backend", all_backends(), ids=lambda backend: backend.name)
def test_each_undeclared_capability_is_refused_with_its_reason(backend):
    device, dtype = min(backend.devices), max(backend.dtypes, key=str)
    group_size = min(size for size in backend.group_sizes or {32} if size > 0)
    scheme = QuantizationScheme(bits=min(backend.bits), group_size=group_size, sym=max(backend.sym))
    size = 1024 * backend.in_multiple, 1024 * backend.out_multiple
    base = LayerSpec(
        name="up", in_features=size[0], out_features=size[1], scheme=scheme, layout=min(backend.layouts), device=device
    )
    base = dataclasses.replace(base, dtype=dtype)
    backend = dataclasses.replace(backend, requires=())
    assert why_not(backend, base) is None
    refusals = {
        "layout=none": dataclasses.replace(base, layout="none"),
        "device=mps": dataclasses.replace(base, device="mps"),
        "dtype=float64": dataclasses.replace(base, dtype=torch.float64),
        **{
            f"bits={bits} (only": dataclasses.replace(base, scheme=scheme.replace(bits=bits))
            for bits in set(range(2, 9)) - backend.bits
        },
        **{
            f"sym={sym} (only": dataclasses.replace(base, scheme=scheme.replace(sym=sym))
            for sym in {True, False} - backend.sym
        },
    }
    if backend.group_sizes is not None:
        refusals["group_size=48"] = dataclasses.replace(base, scheme=scheme.replace(group_size=48))
    if not backend.partial_groups:
        refusals["no multiple of group_size"] = dataclasses.replace(base, in_features=size[0] + 1)
    if not backend.act_order:
        refusals["desc_act=true"] = dataclasses.replace(base, group_index=True, act_order=True)
    if backend.in_multiple > 1:
        refusals[f"no multiple of {backend.in_multiple}"] = dataclasses.replace(base, in_features=size[0] + 1)
    if backend.out_multiple > 1:
        refusals[f"no multiple of {backend.out_multiple}"] = dataclasses.replace(base, out_features=size[1] + 1)
    for text, spec in refusals.items():
        assert text in (why_not(backend, spec) or ""), text


def test_a_missing_package_is_named_with_its_pip_line():
    backend = dataclasses.replace(BACKENDS["torch"], requires=("no_such_package",))
    spec = LayerSpec(name="up", in_features=32, out_features=32, scheme=QuantizationScheme(), layout="gptq")
    assert "needs no_such_package (pip install no_such_package)" in why_not(backend, spec)


@pytest.mark.parametrize("backend", ["torch", "torch_cpu_int4"])
def test_gradients_reach_the_input(make_case, backend):
    scheme = QuantizationScheme(group_size=32)
    fields = {"in_features": 64, "out_features": 32, "scheme": scheme, "layout": "gptq", "dtype": torch.bfloat16}
    case = make_case(LayerSpec(name="up", **fields), backend).ready()
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    case.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, case.weight.bfloat16().sum(0).expand(3, 64), rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("name", ["triton", "tinygemm", "gptqmodel:marlin"])
def test_kernels_for_newer_gpus_are_refused_on_older_ones(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scheme = QuantizationScheme(group_size=32)
    spec = LayerSpec(
        name="up", in_features=128, out_features=128, scheme=scheme, layout="gptq", dtype=torch.bfloat16, device="cuda"
    )
    text = "needs an NVIDIA GPU of compute capability 8.0 or later"
    for capability, is_refused in {(7, 5): True, (8, 0): False, (9, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert (text in (why_not(BACKENDS[name], spec) or "")) == is_refused
