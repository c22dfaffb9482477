import torch
from torch import nn
from torch.utils import _pytree as pytree

from auto_round.block import Block
from auto_round.calls import BlockCalls

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
