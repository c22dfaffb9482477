"""What every data type must do, and the straight-through functions they share."""

from __future__ import annotations

import pytest
import torch

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import UNTOUCHED, cast_ste, round_ste, to_codes
from auto_round.schemes import QuantizationScheme, to_scheme

# A new data type is tested here by its entry.
SCHEMES = {
    "int": [
        QuantizationScheme(bits=bits, group_size=group_size, sym=sym, scale_dtype=scale_dtype)
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for group_size, scale_dtype in ((32, "fp16"), (-1, "bf16"), (0, "fp32"))
        for sym in (True, False)
    ],
    "int_dq": [to_scheme(f"gguf:q{bits}_k") for bits in (2, 3, 4, 5, 6)],
    "int_float_zp": [to_scheme(f"gguf:q{bits}_1") for bits in (4, 5)],
    "fp": [
        QuantizationScheme.from_dict({"data_type": "fp", "group_size": group_size})
        for group_size in (-1, 0, 16, (4, 32))
    ],
    "fp_e5m2": [QuantizationScheme.from_dict({"data_type": "fp_e5m2"})],
    "mx_fp": [QuantizationScheme.from_dict({"data_type": "mx_fp", "bits": bits}) for bits in (4, 6, 8)],
    "mx_fp_e3m2": [QuantizationScheme.from_dict({"data_type": "mx_fp_e3m2"})],
    "mx_fp_e5m2": [QuantizationScheme.from_dict({"data_type": "mx_fp_e5m2"})],
    "mx_int": [QuantizationScheme.from_dict({"data_type": "mx_int", "bits": bits}) for bits in (4, 8)],
    "nv_fp": [QuantizationScheme.from_dict({"data_type": "nv_fp"})],
}
CASES = [pytest.param(scheme, id=f"{scheme} {scheme.scale_dtype}") for rows in SCHEMES.values() for scheme in rows]
SHAPE = (6, 80)
# Types with a scale format of their own: E4M3, products of a float16 number and a code.
STORED_SCALES = {"nv_fp": torch.float8_e4m3fn, "int_dq": torch.float32}


def random_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05


def moved(params: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Returns parameters as tuning leaves them: offsets in [-0.5, 0.5], clip factors in [0.7, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(value.shape, generator=generator) for name, value in params.items()}
    return {name: value - 0.5 if name == "rounding" else 0.7 + 0.3 * value for name, value in drawn.items()}


def test_every_data_type_is_tested_here():
    assert set(DATA_TYPES) == set(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_data_type_knows_its_name(name):
    assert DATA_TYPES[name].name == name


@pytest.mark.parametrize("scheme", CASES)
def test_encoded_weights_are_exactly_the_fake_quantized_ones(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight()
    for range_ in (data_type.minmax_range(weight, scheme), data_type.search_range(weight, scheme, None)):
        for params in (data_type.trainable(weight, scheme), moved(data_type.trainable(weight, scheme))):
            encoded = data_type.encode(weight, scheme, range_, params)
            fake = data_type.fake_quantize(weight, scheme, range_, params)
            assert torch.equal(encoded.dequantize(), fake)
            assert encoded.shape == SHAPE
            assert encoded.scheme == scheme
            assert int(encoded.codes.max()) < 2**scheme.bits
            dtype = STORED_SCALES.get(scheme.data_type, getattr(torch, scheme.scale_dtype))
            assert torch.equal(encoded.scale, encoded.scale.to(dtype).float())


@pytest.mark.parametrize("scheme", CASES)
def test_fresh_parameters_are_float32_and_do_nothing(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight().bfloat16()
    params = data_type.trainable(weight, scheme)
    assert all(value.dtype == torch.float32 for value in params.values())
    assert not params["rounding"].any()
    assert all((value == 1).all() for name, value in params.items() if name != "rounding")


@pytest.mark.parametrize("scheme", CASES)
def test_the_rounding_state_says_where_weights_stand(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight()
    range_ = data_type.minmax_range(weight, scheme)
    params = moved(data_type.trainable(weight, scheme))
    state = data_type.rounding_state(weight, scheme, range_, params)
    # Half a unit, which is half a step, but for FP4, whose largest step is two units.
    assert state.residual.abs().max() <= (1.0 if scheme.data_type.endswith("_fp") and scheme.bits == 4 else 0.5)
    assert state.in_range.dtype == torch.bool
    # Where nothing was cut, W_hat = scale * (W / scale + V - residual).
    width = weight.shape[1]
    cells = [x.expand_as(params["rounding"]).flatten(1)[:, :width] for x in (state.scale, state.residual)]
    offset, inside = (x.flatten(1)[:, :width] for x in (params["rounding"], state.in_range))
    expected = cells[0] * ((weight / cells[0] + offset) - cells[1])
    fake = data_type.fake_quantize(weight, scheme, range_, params)
    # Two roundings of values up to the largest weight in float32.
    assert torch.allclose(fake[inside], expected[inside], rtol=0, atol=4 * 2.0**-24 * float(weight.abs().max()) * 2)


@pytest.mark.parametrize("scheme", CASES)
def test_gradients_reach_every_parameter_and_are_finite(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight()
    params = {name: value.requires_grad_() for name, value in data_type.trainable(weight, scheme).items()}
    fake = data_type.fake_quantize(weight, scheme, data_type.minmax_range(weight, scheme), params)
    (fake - weight).square().sum().backward()
    for name, value in params.items():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.any(), name


@pytest.mark.parametrize("scheme", CASES)
def test_nothing_is_changed_in_place(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight()
    before = weight.clone()
    range_ = data_type.search_range(weight, scheme, torch.ones(SHAPE[1]))
    kept = {name: value.clone() for name, value in range_.items()}
    data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))
    assert torch.equal(weight, before)
    assert all(torch.equal(range_[name], kept[name]) for name in kept)


def error_of_output(weight: torch.Tensor, products: torch.Tensor, scheme: QuantizationScheme, importance) -> float:
    """Returns sum over rows and groups of d' M d, d the rounding error of a group, M the mean products."""
    data_type = DATA_TYPES[scheme.data_type]
    range_ = data_type.search_range(weight, scheme, importance)
    difference = data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme)).dequantize() - weight
    groups = difference.double().unflatten(1, (products.shape[0], -1))
    return float(torch.einsum("ogk,gkl,ogl->", groups, products.double(), groups))


@pytest.mark.parametrize(
    "scheme", [s for schemes in SCHEMES.values() for s in schemes if s.group_size in (16, 32)], ids=str
)
@pytest.mark.parametrize("groups", [1, 3, 16, 32])  # 16 and 32: as many groups as channels in one
def test_products_of_channels_lower_the_error_of_the_output(scheme, groups):
    """Channels that move together: what one rounds up another can make good, which mean squares do not tell."""
    size = scheme.group_size
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, groups * size, generator=generator) * 0.05
    tokens = torch.randn(500, groups, size, generator=generator) + 2 * torch.randn(500, groups, 1, generator=generator)
    products = torch.einsum("tgk,tgl->gkl", tokens, tokens) / len(tokens)
    squares = torch.diagonal(products, dim1=1, dim2=2).reshape(-1)
    with_products = error_of_output(weight, products, scheme, products)
    with_squares = error_of_output(weight, products, scheme, squares)
    # float32 sums order candidates of nearly equal error differently at 8 bits, hence the margin.
    assert with_products <= with_squares * (1 + 1e-3)
    assert scheme.bits > 4 or with_products < with_squares


@pytest.mark.parametrize("scheme", CASES)
def test_sixteen_bit_weights_are_computed_in_float32(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight().bfloat16()
    results = [
        data_type.encode(w, scheme, data_type.minmax_range(w, scheme), data_type.trainable(w, scheme)).dequantize()
        for w in (weight, weight.float())
    ]
    assert torch.equal(*results)


def test_rounding_goes_to_even_and_lets_the_gradient_through():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.4], requires_grad=True)
    rounded = round_ste(x)
    assert rounded.tolist() == [-2, 0, 0, 2, 2]
    (rounded * torch.arange(5.0)).sum().backward()
    assert x.grad.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_cast_is_exact_and_lets_the_gradient_through(name):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cast = cast_ste(x, name)
    assert torch.equal(cast, x.to(getattr(torch, name)).float())
    cast.sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_cast_of_too_large_a_number_stays_finite(name):
    largest = torch.finfo(getattr(torch, name)).max
    x = torch.tensor([3e38, -3e38, 1e6, -1e6])
    assert torch.equal(cast_ste(x, name), x.clamp(-largest, largest).to(getattr(torch, name)).float())


@pytest.mark.parametrize("scheme", CASES)
def test_untouched_parameters_are_the_fresh_ones(scheme):
    data_type, weight = DATA_TYPES[scheme.data_type], random_weight()
    weight[0, :3] = torch.tensor([0.0, -0.0, -1e-9])
    range_ = data_type.minmax_range(weight, scheme)
    fresh = data_type.encode(weight, scheme, range_, data_type.trainable(weight, scheme))
    bare = data_type.encode(weight, scheme, range_, UNTOUCHED)
    assert torch.equal(bare.codes, fresh.codes)
    assert torch.equal(bare.scale, fresh.scale)
    assert (bare.zero_point is None) == (fresh.zero_point is None)
    assert bare.zero_point is None or torch.equal(bare.zero_point, fresh.zero_point)


@pytest.mark.parametrize("bounds", [(0, 2**bits - 1) for bits in range(2, 9)] + [(-4, 3), (-32, 31)], ids=str)
@pytest.mark.parametrize("zero", [None, 1, 0, 8, 200])
def test_codes_are_rounded_moved_by_the_zero_point_and_clamped(bounds, zero):
    latent = torch.tensor([0.5, 1.5, -0.5, -0.51, 2.0**30, -(2.0**30), 3e38, -3e38, -0.0, 127.5, -128.5])
    # Python rounds ties to even too, and its integers do not overflow.
    first, last = bounds
    expected = [min(max(round(value) + (zero or 0), first), last) - first for value in latent.tolist()]
    given = None if zero is None else torch.tensor([float(zero)])
    assert to_codes(latent, given, bounds).tolist() == expected
