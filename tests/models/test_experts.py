"""Experts as linear layers against the modules of Transformers that fuse them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.activations import ACT2FN

from auto_round.models.experts import (
    FusedLayout,
    LinearExperts,
    every_expert_sees_all_tokens,
    fused_experts,
    fused_layout,
    with_linear_experts,
)

NAMES = ("gate_proj", "up_proj", "down_proj")
PLAIN = FusedLayout(count=4, gated=True, interleaved=False, transposed=False, sorted_input=False)
LAYOUTS = {
    "qwen3_moe": PLAIN,
    "mixtral": PLAIN,
    "deepseek_v3": PLAIN,
    "granitemoe": PLAIN,
    "gpt_oss": FusedLayout(4, gated=True, interleaved=True, transposed=True, sorted_input=False),
    "llama4": FusedLayout(4, gated=True, interleaved=False, transposed=True, sorted_input=True),
}


def unfused(model: nn.Module) -> nn.Module:
    experts = fused_experts(model)
    return with_linear_experts(model, experts, dict.fromkeys(experts, NAMES))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_layout_of_fused_experts_is_found(make_model, kind):
    found = fused_experts(make_model(kind))
    assert found
    assert set(found.values()) == {LAYOUTS[kind]}
    assert {name.rpartition(".")[2] for name in found} == {"experts"}


@pytest.mark.parametrize("kind", LAYOUTS)
@torch.no_grad()
def test_linear_experts_compute_what_fused_ones_compute(make_model, token_ids, kind):
    """Where the original's weights are transposed, its products add in another order."""
    model, ids = make_model(kind), token_ids(2)
    tolerance = 1e-5 if LAYOUTS[kind].transposed else 0.0
    torch.testing.assert_close(unfused(model)(ids).logits, model(ids).logits, rtol=0, atol=tolerance)


def test_the_given_model_stays_as_it_is_and_shares_its_weights(make_model):
    model = make_model("gpt_oss")
    before = {name: id(module) for name, module in model.named_modules()}
    twin = unfused(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert twin.lm_head is model.lm_head
    experts = model.model.layers[0].mlp.experts
    expert = twin.model.layers[0].mlp.experts[1]
    assert torch.equal(expert.up_proj.weight, experts.gate_up_proj[1, :, 1::2].T)
    assert torch.equal(expert.gate_proj.bias, experts.gate_up_proj_bias[1, ::2])
    with torch.no_grad():
        expert.down_proj.weight.fill_(3)
    assert (experts.down_proj[1] == 3).all()
    assert not (experts.down_proj[0] == 3).any()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_slices_cover_a_fused_tensor_once_and_join_to_it(make_model, kind):
    for name, layout in fused_experts(make_model(kind)).items():
        module = make_model(kind).get_submodule(name)
        for tensor in layout.tensors(with_bias=kind == "gpt_oss"):
            fused = torch.arange(getattr(module, tensor).numel()).view_as(getattr(module, tensor))
            pieces = {piece.parameter: piece.of(fused) for piece in layout.slices(tensor, NAMES)}
            assert sorted(torch.cat([piece.flatten() for piece in pieces.values()]).tolist()) == list(
                range(fused.numel())
            )
            assert torch.equal(layout.join(tensor, pieces, NAMES), fused)


class Ungated(nn.Module):
    """Experts of two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 5, 7)), nn.Parameter(torch.randn(3, 7, 5))
        self.act_fn = ACT2FN["relu2"]

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        every = torch.stack(
            [self.act_fn(hidden @ up.T) @ down.T for up, down in zip(self.up_proj, self.down_proj, strict=True)], 1
        )
        return (every.gather(1, indices[..., None].expand(-1, -1, 7)) * weights[..., None]).sum(1)


@torch.no_grad()
def test_experts_without_a_gate_have_two_layers():
    torch.manual_seed(0)
    module = Ungated()
    layout = fused_layout(module)
    assert layout == FusedLayout(3, gated=False, interleaved=False, transposed=False, sorted_input=False)
    experts = LinearExperts(module, layout, NAMES)
    assert [name for name, _ in experts[0].named_parameters()] == ["up_proj.weight", "down_proj.weight"]
    call = (torch.randn(6, 7), torch.tensor([[0, 2], [1, 0]] * 3), torch.rand(6, 2))
    torch.testing.assert_close(experts(*call), module(*call))


def test_what_is_fused_otherwise_is_left_alone():
    other = Ungated()
    other.scale = nn.Parameter(torch.ones(3))
    assert fused_layout(other) is None
    odd = Ungated()
    odd.up_proj = nn.Parameter(torch.randn(3, 5, 6))
    assert fused_layout(odd) is None
    assert fused_layout(nn.Linear(2, 2)) is None


@torch.no_grad()
def test_every_expert_can_see_all_tokens_while_outputs_stay():
    torch.manual_seed(0)
    experts = LinearExperts(Ungated(), fused_layout(Ungated()), NAMES)
    seen: dict[int, int] = {}
    for index, expert in enumerate(experts):
        expert.up_proj.register_forward_hook(lambda _m, args, _out, index=index: seen.update({index: len(args[0])}))
    call = (torch.randn(6, 7), torch.tensor([[0], [0], [2], [0], [2], [0]]), torch.rand(6, 1))
    routed = experts(*call)
    assert seen == {0: 4, 2: 2}
    assert experts.token_counts(*call).tolist() == [4, 0, 2]
    with every_expert_sees_all_tokens():
        torch.testing.assert_close(experts(*call), routed)
    assert seen == {0: 6, 1: 6, 2: 6}
    seen.clear()
    experts(*call)
    assert seen == {0: 4, 2: 2}


@torch.no_grad()
def test_tokens_are_counted_where_the_rows_of_experts_lie_together(make_model, token_ids):
    model = make_model("llama4")
    found = []
    experts = unfused(model).model.layers[0].feed_forward.experts
    router = model.model.layers[0].feed_forward.router
    experts.register_forward_pre_hook(lambda module, args: found.append(module.token_counts(*args)))
    chosen = []
    router.register_forward_hook(lambda _m, _args, out: chosen.append((out[0] > 0).sum(0)))
    twin = with_linear_experts(model, {}, {})
    assert twin is model
    block = unfused(model)
    block.model.layers[0].feed_forward.experts = experts
    block(token_ids(2))
    assert found[0].tolist() == chosen[0].tolist()
    assert found[0].sum() == 32


@pytest.mark.parametrize("kind", LAYOUTS)
def test_stacked_weights_give_what_single_ones_give_and_their_gradients(make_model, token_ids, kind):
    """One tensor for each projection of all experts; sums may have another order."""
    model, ids = unfused(make_model(kind)), token_ids(2)
    single = dict(model.named_parameters())
    stacks = {
        f"{name}.{stack}": [f"{name}.{member}" for member in members]
        for name, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for stack, members in module.stack_members().items()
    }
    layers = sum(isinstance(module, LinearExperts) for module in model.modules())
    assert len(stacks) == layers * (6 if kind == "gpt_oss" else 3)
    joined = {stack: torch.stack([single[m].detach() for m in members]) for stack, members in stacks.items()}
    for tensor in [*single.values(), *joined.values()]:
        tensor.requires_grad_()
    wanted, found = model(ids).logits, functional_call(model, joined, (ids,)).logits
    torch.testing.assert_close(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for stack, members in stacks.items():
        zeros = torch.zeros_like(single[members[0]])  # of an expert that no token went to
        expected = torch.stack([zeros if single[m].grad is None else single[m].grad for m in members])
        torch.testing.assert_close(joined[stack].grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_hooks_on_single_experts_are_noticed(make_model):
    experts = unfused(make_model("qwen3_moe")).model.layers[0].mlp.experts
    assert not experts.is_watched
    experts.register_forward_pre_hook(lambda *_: None)
    assert not experts.is_watched
    handle = experts[3].up_proj.register_forward_hook(lambda *_: None)
    assert experts.is_watched
    handle.remove()
    assert not experts.is_watched


def test_stacks_are_no_part_of_a_state(make_model):
    names = unfused(make_model("mixtral")).state_dict().keys()
    assert not [name for name in names if "stack_of" in name]
