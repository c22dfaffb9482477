import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme
from auto_round.tuning import search
from auto_round.tuning.search import searched_ranges

INT4 = QuantizationScheme(bits=4, group_size=32)
INT2 = QuantizationScheme(bits=2, group_size=32, sym=False)
SCHEMES = {
    "symmetric": INT4,
    "asymmetric": INT2,
    "rows": QuantizationScheme(bits=4, group_size=-1),
    "a shorter last group": QuantizationScheme(bits=3, group_size=40),
    "mxfp4": PRESET_SCHEMES["MXFP4"],
    "mxfp8": PRESET_SCHEMES["MXFP8"],
    "nvfp4": PRESET_SCHEMES["NVFP4"],
    "gguf": QuantizationScheme(bits=4, group_size=32, sym=False, data_type="int_float_zp"),
}


def make_importance(kind, groups=4, size=32):
    if kind == "squares":
        return torch.rand(groups * size) + 0.01
    x = torch.randn(64, groups, size)
    return torch.einsum("ngk,ngl->gkl", x, x) / 64


@pytest.mark.parametrize("at_a_time", [1, 3, 8], ids=["one", "some", "all"])
@pytest.mark.parametrize("kind", ["squares", "products", "unknown"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_found_for_several_weights_is_what_is_found_for_each(name, kind, at_a_time, monkeypatch):
    scheme = SCHEMES[name]
    if kind == "products" and scheme.group_size != 32:
        pytest.skip("products are measured for groups that divide the row")
    torch.manual_seed(0)
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", {"cpu": at_a_time * 16 * 128})
    weights = [torch.randn(16, 128) * (i + 1) for i in range(5)]
    importance = [None if kind == "unknown" or i == 2 else make_importance(kind) for i in range(5)]
    data_type = DATA_TYPES[scheme.data_type]
    for found, weight, own in zip(
        searched_ranges(weights, scheme, importance, [None] * 5), weights, importance, strict=True
    ):
        wanted = data_type.search_range(weight, scheme, own)
        assert found.keys() == wanted.keys()
        if own is None or own.ndim == 1:
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        else:  # batched products have another order of sums, and of two scales that are as good either may win
            errors = [product_error(weight, scheme, range_, own) for range_ in (found, wanted)]
            torch.testing.assert_close(*errors, rtol=1e-4, atol=0)


def product_error(weight, scheme, range_, products):
    """Returns (O, G): squared errors of what rounding to nearest gives, under mean products of channels."""
    data_type = DATA_TYPES[scheme.data_type]
    rounded = data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme)).dequantize()
    residual = (rounded - weight).unflatten(1, (-1, scheme.group_size))
    return torch.einsum("ogk,gkl,ogl->og", residual, products, residual)


def test_as_many_weights_stand_side_by_side_as_a_search_takes(monkeypatch):
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", {"cpu": 3 * 16 * 128})
    widths = []
    data_type = DATA_TYPES["int"]
    found = type(data_type).search_range
    monkeypatch.setattr(
        type(data_type), "search_range", lambda self, w, *rest: widths.append(w.shape[1]) or found(self, w, *rest)
    )
    searched_ranges([torch.randn(16, 128)] * 7, INT4, [None] * 7, [None] * 7)
    assert widths == [384, 384, 128]
