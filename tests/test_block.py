import dataclasses

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.block import Block, join_experts
from auto_round.calls import BlockCalls
from auto_round.memory import LiveBytes
from auto_round.models.experts import fused_experts, with_linear_experts

# The model passes nothing but the hidden states.
CALLS = BlockCalls((), {}, pytree.tree_flatten(((), {}))[1])


def make_block(**changes):
    torch.manual_seed(0)
    modules = tuple(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    names = ("layers.0", "layers.1")
    tensors = {f"{n}.{p}": t.detach() for n, m in zip(names, modules, strict=True) for p, t in m.named_parameters()}
    values = {
        "names": names,
        "modules": modules,
        "calls": (CALLS, CALLS),
        "tensors": tensors,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return Block(**{**values, **changes})


def test_a_block_is_the_modules_one_after_the_other():
    block, x = make_block(), torch.randn(2, 3, 4)
    one, two = block.modules
    assert torch.equal(block.forward(x, torch.arange(2)), two(one(x)))
    assert block.name == "layers.0..1"


def test_replaced_weights_are_used_and_the_modules_stay_as_they_are():
    block, x = make_block(), torch.randn(2, 3, 4)
    before = block.modules[1][0].weight.clone()
    zeros = {"layers.1.0.weight": torch.zeros(4, 4)}
    expected = block.modules[1][0].bias.relu().expand(2, 3, 4)
    assert torch.equal(block.forward(x, torch.arange(2), zeros), expected)
    assert torch.equal(block.modules[1][0].weight, before)


def test_layers_are_found_by_the_names_of_their_weights():
    block = make_block()
    found = block.layers(["layers.1.0.weight", "lm_head.weight"])
    assert found == {"layers.1.0.weight": block.modules[1][0]}
    assert block.experts() == {}


def test_inputs_pass_their_quantizer_first_and_hooks_are_gone_afterwards():
    block = make_block(input_quantizers={"layers.0.0.weight": torch.round})
    x = torch.randn(1, 2, 4) * 3
    assert torch.equal(block.forward(x, torch.arange(1)), make_block().forward(x.round(), torch.arange(1)))
    assert not block.modules[0][0]._forward_pre_hooks


class Part(nn.Module):
    """Two layers with a wide tensor between them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x, *, scale=1.0):
        return self.down(torch.sin(self.up(x))) * scale


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp, self.norm = Part(), Part(), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.attention(x, scale=0.5)
        return x + self.mlp(self.norm(x))


@pytest.fixture(params=[{}, {"input_quantizers": {"layers.0.mlp.down.weight": lambda x: x.detach().round() + x}}])
def two_parts(request):
    torch.manual_seed(0)
    module = TwoParts()
    tensors = {f"layers.0.{name}": tensor.detach() for name, tensor in module.named_parameters()}
    changes = {"names": ("layers.0",), "modules": (module,), "calls": (CALLS,), "tensors": tensors, **request.param}
    return make_block(**changes)


def gradients_and_kept(block, x):
    """Returns output, gradients of other weights than the module's own, and bytes that live between the passes."""
    weights = {name: (tensor * 2).requires_grad_() for name, tensor in block.tensors.items()}
    with LiveBytes() as live:
        output = block.forward(x, torch.arange(len(x)), weights)
        kept = live.now
        found = torch.autograd.grad(output.square().sum(), list(weights.values()))
    return output, found, kept


def test_a_block_that_recomputes_has_the_same_gradients_and_keeps_less(two_parts):
    x = torch.randn(8, 16, 4)
    output, gradients, kept = gradients_and_kept(two_parts, x)
    again, same, less = gradients_and_kept(dataclasses.replace(two_parts, recomputes=True), x)
    assert torch.equal(again, output)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert less < kept / 4


def test_recomputing_leaves_nothing_on_the_modules(two_parts):
    block = dataclasses.replace(two_parts, recomputes=True)
    before = [sorted(vars(module)) for module in block.modules[0].modules()]
    gradients_and_kept(block, torch.randn(2, 3, 4))
    assert before == [sorted(vars(module)) for module in block.modules[0].modules()]
    with pytest.raises(RuntimeError):
        block.forward(torch.randn(2, 3, 5), torch.arange(2))
    assert before == [sorted(vars(module)) for module in block.modules[0].modules()]
    assert not any(module._forward_pre_hooks for module in block.modules[0].modules())


@pytest.fixture
def experts_block(make_model):
    """Returns a block that is a layer with four experts, its tensors joined, and the layer's experts by name."""
    model = make_model("qwen3_moe")
    layouts = fused_experts(model)
    twin = with_linear_experts(model, layouts, dict.fromkeys(layouts, ("gate_proj", "up_proj", "down_proj")))
    mlp = twin.model.layers[0].mlp
    tensors = {f"mlp.{name}": tensor.detach() for name, tensor in mlp.named_parameters()}
    stacks = join_experts(("mlp",), (mlp,), tensors)
    return Block(
        ("mlp",), (mlp,), (CALLS,), tensors, torch.device("cpu"), torch.float32, stacks=stacks
    )  # fmt: skip


UP, PARTS = "mlp.experts.stack_of_up_proj", [f"mlp.experts.{i}.up_proj.weight" for i in range(4)]


def test_tensors_of_experts_are_views_of_one(experts_block):
    assert list(experts_block.stacks[UP]) == PARTS
    stack = experts_block.tensors[UP]
    assert stack.shape == (4, 32, 64)
    for index, part in enumerate(PARTS):
        assert experts_block.tensors[part].data_ptr() == stack[index].data_ptr()


def test_parts_and_stacks_may_be_replaced_alike(experts_block):
    x, samples = torch.randn(2, 3, 64), torch.arange(2)
    new = {part: torch.randn(32, 64) for part in PARTS}
    (module,) = experts_block.modules
    own = {name.removeprefix("mlp."): tensor for name, tensor in new.items()}
    wanted = torch.func.functional_call(module, own, (x,))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(experts_block.forward(x, samples, new), wanted)
    joined = experts_block.stacked(new)
    assert joined.keys() == {UP}
    assert torch.equal(experts_block.forward(x, samples, joined), experts_block.forward(x, samples, new))
    one = {PARTS[1]: new[PARTS[1]]}
    assert experts_block.stacked(one) == one
    assert not torch.equal(experts_block.forward(x, samples, one), experts_block.forward(x, samples))


def test_experts_run_one_by_one_where_inputs_are_quantized(experts_block):
    """Also with a stack in place of the parts, whose gradient then comes from its parts."""
    x, samples = torch.randn(2, 3, 64), torch.arange(2)
    seen = []
    rounding = {part: lambda rows: seen.append(len(rows)) or rows.round() for part in PARTS}
    quantized = dataclasses.replace(experts_block, input_quantizers=rounding)
    stack = experts_block.tensors[UP].clone().requires_grad_()
    output = quantized.forward(x, samples, {UP: stack})
    assert sum(seen) == 12  # two of four experts for each of six tokens
    assert torch.equal(output, quantized.forward(x, samples))
    output.sum().backward()
    assert stack.grad.abs().sum() > 0


def test_what_a_block_lacks_keeps_no_memory(experts_block):
    lean = experts_block.without({PARTS[0], "mlp.gate.weight"})
    assert not {PARTS[0], UP, "mlp.gate.weight"} & lean.tensors.keys()
    assert lean.tensors[PARTS[1]].untyped_storage().nbytes() == 32 * 64 * 4
    assert torch.equal(lean.tensors[PARTS[1]], experts_block.tensors[PARTS[1]])
    x, given = torch.randn(1, 5, 64), {name: experts_block.tensors[name] for name in (PARTS[0], "mlp.gate.weight")}
    assert torch.equal(lean.forward(x, torch.arange(1), given), experts_block.forward(x, torch.arange(1)))
