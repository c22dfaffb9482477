import copy

import pytest
import torch
from torch.nn import functional as F

from auto_round.errors import CheckpointError
from auto_round.inference.backends.torch_any import unpack_codes
from auto_round.inference.layer import LayerSpec, WeightKernel
from auto_round.schemes import QuantizationScheme


def spec_of(**fields):
    scheme = QuantizationScheme(bits=fields.pop("bits", 4), group_size=fields.pop("group_size", 32), sym=False)
    return LayerSpec(
        **{"name": "up", "in_features": 96, "out_features": 32, "scheme": scheme, "layout": "gptq"} | fields
    )


def test_buffers_have_the_names_and_shapes_of_the_layout():
    buffers = spec_of(bias=True, group_index=True, dtype=torch.bfloat16).buffers()
    assert buffers == {
        "qweight": ((12, 32), torch.int32),
        "qzeros": ((3, 4), torch.int32),
        "scales": ((3, 32), torch.float32),
        "g_idx": ((96,), torch.int32),
        "bias": ((32,), torch.bfloat16),
    }


def test_settling_and_preparing_leave_the_stored_tensors_as_they_were(make_case):
    case = make_case(spec_of(bias=True))
    before = copy.deepcopy(case.layer.state_dict())
    case.layer.scales = case.layer.scales.float()
    after = case.ready().layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_settle_in_the_narrowest_exact_dtype(make_case, dtype):
    case = make_case(spec_of())
    value = {torch.float16: 1 + 2**-10, torch.bfloat16: 2.0**100, torch.float32: 1 + 2**-20}[dtype]
    case.layer.scales = torch.full_like(case.layer.scales, value, dtype=torch.float32)
    case.layer.settle()
    assert case.layer.scales.dtype == dtype
    assert bool((case.layer.scales.float() == value).all())


def test_casting_the_layer_keeps_its_scales(make_case):
    case = make_case(spec_of(bias=True)).ready()
    x = torch.randn(3, 96)
    before = case.layer(x)
    case.layer.to(torch.bfloat16)
    assert case.layer.scales.dtype == torch.float16
    assert case.layer.bias.dtype == torch.bfloat16
    case.layer.bias = case.bias
    assert torch.equal(case.layer(x), before)


def test_a_copied_layer_computes_the_same(make_case):
    layer = make_case(spec_of()).ready().layer
    x = torch.randn(2, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("garbage", [0, -1, 10**9], ids=["zeros", "negative", "huge"])
def test_an_uninitialised_group_index_becomes_sequential(make_case, garbage):
    case = make_case(spec_of(group_index=True))
    case.layer.g_idx = torch.full((96,), garbage, dtype=torch.int32)
    layer = case.ready().layer
    assert layer.g_idx.tolist() == [0] * 32 + [1] * 32 + [2] * 32
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), F.linear(x, case.weight))


def test_an_invalid_group_index_is_an_error_when_it_matters(make_case):
    case = make_case(spec_of(group_index=True, act_order=True))
    case.layer.g_idx = torch.zeros(96, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"up\.g_idx is missing or not a permutation .* desc_act=true"):
        case.layer.settle()


def test_a_group_index_out_of_order_is_kept(make_case):
    case = make_case(spec_of(group_index=True, act_order=True), shuffled=True)
    stored = case.layer.g_idx.clone()
    case.layer.settle()
    assert torch.equal(case.layer.g_idx, stored)
    assert not case.layer.has_ordered_groups()


def test_calling_before_post_init_says_so(make_case):
    with pytest.raises(AssertionError, match="up: post_init was not called"):
        make_case(spec_of()).layer(torch.randn(1, 96))


def test_printing_a_layer_shows_its_scheme(make_case):
    assert "96, 32, int4 g32 asym, layout=gptq, bias=False" in repr(make_case(spec_of()).layer)


class HoldingKernel(WeightKernel):
    """Takes the codes, and remembers for what it was made."""

    def __init__(self, layer):
        super().__init__()
        self.made_for = layer.spec
        self.register_buffer("held", unpack_codes(layer, slice(0, layer.out_features)), persistent=False)
        self.register_buffer("steps", torch.ones(1), persistent=False)

    def forward(self, layer, x):
        return F.linear(x, self.held.to(x.dtype), layer.bias)

    def codes(self):
        return self.held


def holding_layer(make_case, spec=None, choose=True):
    spec = spec or spec_of(bias=True)
    case = make_case(spec)
    case.layer.make_kernel = HoldingKernel
    case.layer.choose_kernel = (lambda _: HoldingKernel) if choose else None
    return case.ready().layer


@pytest.mark.parametrize("layout", ["gptq", "gptq_zp", "awq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_that_the_kernel_holds_is_saved_as_it_was_stored(make_case, layout, bits):
    if layout == "awq" and bits != 4:
        pytest.skip("awq holds 4 bits only")
    spec = spec_of(layout=layout, bits=bits, out_features=29)
    stored = copy.deepcopy(make_case(spec).layer.state_dict())
    layer = holding_layer(make_case, spec)
    assert layer.qweight.numel() == 0
    saved = layer.state_dict()
    assert list(saved) == list(stored)
    assert all(torch.equal(saved[name], stored[name]) for name in stored if name != "scales")
    assert layer.qweight.numel() == 0


def test_moving_to_the_same_place_keeps_the_kernel(make_case):
    layer = holding_layer(make_case)
    kernel = layer.kernel
    layer.to("cpu").to(torch.float32)
    layer.float()
    assert layer.kernel is kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_layer_gets_a_kernel_for_the_new_dtype(make_case, dtype):
    layer = holding_layer(make_case)
    layer.to(dtype)
    assert layer.kernel is None
    layer(torch.randn(1, 96, dtype=dtype))
    assert layer.kernel.made_for == layer.spec
    assert (layer.spec.dtype, layer.spec.device) == (dtype, "cpu")


def test_a_cast_that_changes_nothing_does_not_touch_the_kernel(make_case):
    layer = holding_layer(make_case, spec_of(dtype=torch.bfloat16))
    kernel = layer.kernel
    layer.to(torch.bfloat16)
    assert layer.kernel is kernel
    assert kernel.steps.dtype == torch.float32


def test_a_kernel_is_chosen_for_where_the_tensors_are(make_case):
    """With a dictionary as device_map the device that layers were planned for may be another one."""
    asked = []
    case = make_case(spec_of(device="cuda"))
    case.layer.choose_kernel = lambda spec: asked.append(spec) or HoldingKernel
    layer = case.ready().layer
    assert layer.spec.device == "cpu"
    assert asked == [layer.spec]
    layer.prepare()
    assert asked == [layer.spec]


def test_a_layer_moved_without_a_choice_keeps_its_kind_of_kernel(make_case):
    layer = holding_layer(make_case, choose=False)
    layer.half()
    layer(torch.randn(1, 96).half())
    assert isinstance(layer.kernel, HoldingKernel)


def test_loading_other_tensors_gives_up_the_kernel_made_of_the_first(make_case):
    layer = holding_layer(make_case, spec_of())
    other = make_case(spec_of())
    other.layer.qweight = torch.randint(-(2**31), 2**31 - 1, other.layer.qweight.shape, dtype=torch.int32)
    # No 16-bit type holds these scales.
    other.layer.scales = torch.full_like(other.layer.scales, 1 + 2**-20, dtype=torch.float32)
    stored = copy.deepcopy(other.layer.state_dict())
    layer.load_state_dict(stored)
    layer(torch.randn(1, 96))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.kernel.held, unpack_codes(other.layer, slice(0, 32)))


def test_a_copied_layer_whose_kernel_holds_the_weight_is_whole(make_case):
    layer = holding_layer(make_case)
    twin = copy.deepcopy(layer)
    layer.half()
    assert all(
        torch.equal(tensor, twin.state_dict()[name]) for name, tensor in layer.state_dict().items() if name != "bias"
    )
