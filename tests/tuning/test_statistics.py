import copy
import dataclasses

import pytest
import torch
from torch import nn

from auto_round.block import Block
from auto_round.calibration import CalibrationSet
from auto_round.calls import BlockCalls
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.statistics import channel_importance, group_products, output_sensitivity

W4 = QuantizationScheme(bits=4, group_size=32)


class Gated(nn.Module):
    """A small block without attention: two layers whose outputs meet, one that no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))


@pytest.fixture
def gated():
    """Returns the block, its view and two batches of inputs."""
    torch.manual_seed(0)
    module = Gated()
    tensors = {f"b.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    _, spec = torch.utils._pytree.tree_flatten(((), {}))
    cpu = torch.device("cpu")
    return Block(("b",), (module,), (BlockCalls((), {}, spec),), tensors, cpu, torch.float32)


NAMES = ["b.up.weight", "b.down.weight", "b.idle.weight"]
BATCHES = [slice(0, 2), slice(2, 3)]


def test_channel_importance_is_the_mean_square_of_a_layers_inputs(gated):
    inputs = torch.randn(3, 4, 6)
    found = channel_importance(gated, inputs, BATCHES, NAMES)
    module = gated.modules[0]
    with torch.no_grad():
        expected_down = torch.tanh(module.up(inputs)).double().square().mean((0, 1))
    # float32 sums of 12 terms
    assert torch.allclose(found["b.up.weight"].double(), inputs.double().square().mean((0, 1)), rtol=1e-6)
    assert torch.allclose(found["b.down.weight"].double(), expected_down, rtol=1e-6)
    assert found["b.up.weight"].dtype == torch.float32


def test_group_products_are_the_mean_products_of_a_groups_channels(gated):
    inputs = torch.randn(3, 4, 6)
    schemes = {"b.up.weight": W4.replace(group_size=3), "b.down.weight": W4.replace(group_size=-1)}
    found = group_products(gated, inputs, BATCHES, schemes)
    rows = inputs.double().flatten(0, 1).unflatten(1, (2, 3))
    expected = torch.einsum("rgk,rgl->gkl", rows, rows) / 12
    assert torch.allclose(found["b.up.weight"].double(), expected, rtol=1e-5, atol=1e-6)  # float32 sums of 12 terms
    assert found["b.down.weight"].shape == (5,)  # one scale per row: mean squares


def test_groups_that_do_not_divide_the_row_have_mean_squares(gated):
    inputs = torch.randn(3, 4, 6)
    found = group_products(gated, inputs, BATCHES, {"b.up.weight": W4.replace(group_size=4)})
    expected = channel_importance(gated, inputs, BATCHES, NAMES)
    assert torch.equal(found["b.up.weight"], expected["b.up.weight"])


def test_a_layer_that_never_runs_has_no_importance(gated):
    found = channel_importance(gated, torch.randn(3, 4, 6), BATCHES, NAMES)
    assert set(found) == {"b.up.weight", "b.down.weight"}


def test_importance_counts_real_tokens_only(gated):
    inputs, mask = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = mask[2, 1:] = False
    found = channel_importance(gated, inputs, BATCHES, NAMES, mask_NT=mask)
    assert torch.allclose(found["b.up.weight"], inputs[mask].square().mean(0), rtol=1e-6)


def test_importance_of_a_models_block_is_what_its_layers_see(make_model, make_task, token_ids):
    """Oracle: hooks on the whole model in one forward pass."""
    model, seen = make_model(), {}
    task = make_task(W4, model=model)
    hooked = copy.deepcopy(model)
    for name in task.schemes:
        layer = hooked.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        hooked(token_ids(8, 16))
    found = channel_importance(task.block, task.inputs, task.batches, list(task.schemes))
    assert found.keys() == task.schemes.keys()
    for name, importance in found.items():
        assert torch.allclose(importance, seen[name].square().mean((0, 1)), rtol=1e-4), name


def exact_sensitivity(gated, inputs, layer):
    """Returns the mean over tokens of the diagonal of J^T J, from the Jacobian itself."""
    module = gated.modules[0]
    rows = inputs.reshape(-1, 6)

    def output_of(local, row):
        if layer == "up":
            return row + module.down(torch.tanh(local))
        return row + local

    squares = []
    for row in rows:
        local = module.up(row) if layer == "up" else module.down(torch.tanh(module.up(row)))
        jacobian = torch.autograd.functional.jacobian(lambda y, row=row: output_of(y, row), local.detach())
        squares.append(jacobian.square().sum(0))
    return torch.stack(squares).mean(0)


def test_output_sensitivity_estimates_the_diagonal_of_the_jacobians_square(gated):
    """Tokens do not meet in this block, so each token is one probe. With P probes of 6 normal values the estimate of a
    channel c = sum a_i^2 has the variance 2 c^2 / P; 1200 tokens in 20 rounds give 0.9 % of deviation, 5 of them."""
    inputs = torch.randn(3, 4, 6).repeat(100, 1, 1)
    batches = [slice(0, 150), slice(150, 300)]
    generator = torch.Generator().manual_seed(0)
    rounds = [output_sensitivity(gated, inputs, batches, NAMES, generator) for _ in range(20)]
    for layer in ("up", "down"):
        mean = torch.stack([found[f"b.{layer}.weight"] for found in rounds]).mean(0)
        exact = exact_sensitivity(gated, inputs[:3], layer)
        assert torch.allclose(mean, exact, rtol=5 * (2 / (1200 * 20)) ** 0.5), layer


def test_sensitivity_depends_on_the_generator_only(gated):
    inputs = torch.randn(3, 4, 6)
    first, again, other = (
        output_sensitivity(gated, inputs, BATCHES, NAMES, torch.Generator().manual_seed(seed))["b.up.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_sensitivity_does_not_depend_on_how_samples_are_batched(size, gated):
    """Micro-batches draw the same probes one after the other, if a sample has a multiple of 16 values."""
    inputs = torch.randn(8, 8, 6)
    pieces = [slice(start, start + size) for start in range(0, 8, size)]
    whole, parts = (
        output_sensitivity(gated, inputs, batches, NAMES, torch.Generator().manual_seed(3))
        for batches in ([slice(0, 8)], pieces)
    )
    for name, sensitivity in whole.items():
        assert torch.allclose(sensitivity, parts[name], rtol=1e-5), name


def test_sensitivity_counts_outputs_of_real_tokens_only(gated):
    """The last layer's Jacobian is the identity: its sensitivity is the mean square of the probe over real tokens."""
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 1:] = False
    found = output_sensitivity(
        gated, torch.randn(3, 4, 6), [slice(0, 3)], NAMES, torch.Generator().manual_seed(3), mask_NT=mask
    )
    probe = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found["b.down.weight"], probe[mask].square().mean(0), rtol=1e-6)


def test_nothing_stays_behind(gated):
    module = gated.modules[0]
    output_sensitivity(gated, torch.randn(3, 4, 6), BATCHES, NAMES, torch.Generator())
    channel_importance(gated, torch.randn(3, 4, 6), BATCHES, NAMES)
    with pytest.raises(RuntimeError):
        channel_importance(gated, torch.randn(3, 4, 5), BATCHES, NAMES)
    assert not any(child._forward_hooks for child in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_padding_of_a_models_block_does_not_change_statistics(make_task, token_ids):
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, 9:] = False
    task = make_task(W4, data=CalibrationSet(token_ids(8, 16), mask))
    inputs = torch.where(mask[..., None], task.inputs, task.inputs + 1)
    other = dataclasses.replace(task, inputs=inputs)
    for name in (channel_importance, lambda *a, **k: output_sensitivity(*a, torch.Generator().manual_seed(0), **k)):
        one, two = (name(t.block, t.inputs, t.batches, list(t.schemes), mask_NT=mask) for t in (task, other))
        assert all(torch.equal(one[weight], two[weight]) for weight in one)
