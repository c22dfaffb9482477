"""Experts as ordinary linear layers, where a model holds the weights of all experts in one tensor.

Transformers fuses the experts of a layer into three-dimensional parameters. Here such a module is replaced by a list of
experts with a linear layer for each projection, which computes the same. From then on an expert's weights have names
and shapes like any other: plans, statistics, tuning, export and loading need to know nothing of fused tensors.

Shape letters: E experts, T tokens, K experts of a token, H hidden, O out features, I in features.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.models.grouped_product import grouped_linear, permuted

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
BIAS = "_bias"
STACK = "stack_of_"  # name of a parameter of all experts: this and the projection's, with "_bias" for biases
_EVERY_EXPERT: ContextVar[bool] = ContextVar("every_expert", default=False)


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Where the tensor of one expert's projection lies in a fused tensor.

    Attributes:
        parameter: name below the experts module that the slice gets, e.g. "3.gate_proj.weight".
        expert: index along the first dimension.
        part, parts: which of so many equal parts of the output features it is.
        interleaved: parts alternate feature by feature, else they follow each other.
        transposed: the fused tensor is (E, I, O), else (E, O, I) or, for biases, (E, O).
    """

    parameter: str
    expert: int
    part: int
    parts: int
    interleaved: bool
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """Returns the slice, (O, I) or (O,), as a view."""
        own = fused[self.expert].t() if self.transposed else fused[self.expert]
        size = own.shape[0] // self.parts
        return own[self.part :: self.parts] if self.interleaved else own[self.part * size : (self.part + 1) * size]


@dataclasses.dataclass(frozen=True, slots=True)
class FusedLayout:
    """How a module holds its experts.

    Attributes:
        count: number of experts.
        gated: `gate_up_proj` holds two projections, else there is an `up_proj`.
        interleaved, transposed: as in `ExpertSlice`.
        sorted_input: its forward takes one (E * T, H) tensor, the rows of each expert together (Llama 4), else hidden
            states, indices and weights of the chosen experts.
    """

    count: int
    gated: bool
    interleaved: bool
    transposed: bool
    sorted_input: bool

    def tensors(self, *, with_bias: bool) -> list[str]:
        """Returns the names of the fused tensors."""
        weights = [GATE_UP if self.gated else UP, DOWN]
        return weights + [name + BIAS for name in weights] if with_bias else weights

    def slices(self, name: str, leaves: tuple[str, str, str]) -> list[ExpertSlice]:
        """Returns the slices of one fused tensor.

        Args:
            name: its name below the module, e.g. "gate_up_proj" or "down_proj_bias".
            leaves: names of an expert's gate, up and down projections.
        """
        gate, up, down = leaves
        stem, kind = (name.removesuffix(BIAS), "bias") if name.endswith(BIAS) else (name, "weight")
        parts = {GATE_UP: (gate, up), UP: (up,), DOWN: (down,)}[stem]
        return [
            ExpertSlice(
                f"{expert}.{leaf}.{kind}",
                expert,
                part,
                len(parts),
                interleaved=self.interleaved and len(parts) > 1,
                transposed=self.transposed and kind == "weight",
            )
            for expert in range(self.count)
            for part, leaf in enumerate(parts)
        ]

    def join(self, name: str, tensors: Mapping[str, Tensor], leaves: tuple[str, str, str]) -> Tensor:
        """Returns the fused tensor whose slices are `tensors`, by their names below the module."""
        slices = self.slices(name, leaves)
        example = tensors[slices[0].parameter]
        size = slices[0].parts * example.shape[0]
        rest = example.shape[1:]
        shape = (self.count, *rest, size) if slices[0].transposed else (self.count, size, *rest)
        fused = example.new_empty(shape)
        for piece in slices:
            piece.of(fused).copy_(tensors[piece.parameter])
        return fused


def fused_layout(module: nn.Module) -> FusedLayout | None:
    """Returns how a module fuses its experts, or None if it does not, or in a way that is not known."""
    if getattr(module, "has_post_expert_norm", False):
        return None
    layout = layout_of_shapes(
        {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)},
        transposed=getattr(module, "is_transposed", None),
        interleaved=not getattr(module, "is_concatenated", True),
    )
    if layout is None:
        return None
    return dataclasses.replace(layout, sorted_input=len(inspect.signature(type(module).forward).parameters) == 2)


def layout_of_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, transposed: bool | None, interleaved: bool
) -> FusedLayout | None:
    """Returns how tensors of these names and shapes hold experts, or None if in no way that is known.

    Args:
        shapes: name below the module -> shape.
        transposed: None: as the shapes say.
    """
    first = GATE_UP if GATE_UP in shapes else UP
    known = {first, DOWN, first + BIAS, DOWN + BIAS}
    if not {first, DOWN} <= shapes.keys() <= known or len(shapes[first]) != 3 or len(shapes[DOWN]) != 3:
        return None
    parts = 2 if first == GATE_UP else 1
    (count, *wide), (_, *narrow) = shapes[first], shapes[DOWN]
    # Where nobody says it: with a gate, one tensor is wider, which tells; without, (E, O, I) is usual.
    plain = parts == 1 or wide == [parts * narrow[1], narrow[0]]
    transposed = not plain if transposed is None else transposed
    width, inner = (wide[0], narrow[0]) if transposed else (wide[1], narrow[1])
    expected = [[width, parts * inner], [inner, width]] if transposed else [[parts * inner, width], [width, inner]]
    if [wide, narrow] != expected:
        return None
    return FusedLayout(
        count=count, gated=parts == 2, interleaved=interleaved, transposed=transposed, sorted_input=False
    )


class Expert(nn.Module):
    """One expert: two or three linear layers around an activation."""

    def __init__(self, layers: Mapping[str, nn.Linear], activate: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        *self.wide, self.narrow = layers
        self.activate = activate

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Returns (T, H)."""
        children: Mapping[str, Any] = self._modules
        return children[self.narrow](self.activate(*(children[name](hidden_TH) for name in self.wide)))


class LinearExperts(nn.ModuleList):
    """The experts of one layer; computes what the fused module that it was made from computes.

    Where a call brings the weights of all experts as one tensor for each projection (`stack_members` names them), it
    takes a few grouped products. Otherwise experts run one by one.

    Args:
        fused: the module to replace. Parameters become views of its own.
        layout: how it holds its experts.
        leaves: names of an expert's gate, up and down projections.
    """

    def __init__(self, fused: nn.Module, layout: FusedLayout, leaves: tuple[str, str, str]) -> None:
        own = dict(fused.named_parameters(recurse=False))
        views = {piece.parameter: piece.of(t.detach()) for n, t in own.items() for piece in layout.slices(n, leaves)}
        activate = _activation_of(fused, layout)
        names = leaves if layout.gated else leaves[1:]
        super().__init__(
            Expert({name: _linear(views, f"{index}.{name}") for name in names}, activate)
            for index in range(layout.count)
        )
        self.layout, self.leaves = layout, leaves
        for stack in self.stack_members():
            self.register_parameter(stack, None)

    def stack_members(self) -> dict[str, list[str]]:
        """Returns name of a parameter that stands for those of all experts, (E, ...) -> the names of these."""
        found = {}
        for parameter, _ in self[0].named_parameters():
            leaf, _, kind = parameter.rpartition(".")
            stack = f"{STACK}{leaf}{BIAS if kind == 'bias' else ''}"
            found[stack] = [f"{index}.{parameter}" for index in range(len(self))]
        return found

    @property
    def is_watched(self) -> bool:
        """Whether something waits for single experts to run."""
        below = (module for expert in self for module in expert.modules())
        return any(module._forward_hooks or module._forward_pre_hooks for module in below)

    def forward(  # type: ignore[override]
        self, hidden_TH: Tensor, indices_TK: Tensor | None = None, weights_TK: Tensor | None = None
    ) -> Tensor:
        """Returns (T, H): the outputs of each token's experts, weighted and added.

        Args:
            hidden_TH: or (E * T, H), the rows of each expert together, if the original's forward takes that.
        """
        if indices_TK is None or weights_TK is None:
            return self._stacked_sorted(hidden_TH) if self._is_stacked else self._forward_sorted(hidden_TH)
        if self._is_stacked:
            return self._stacked_routed(hidden_TH, indices_TK, weights_TK)
        choices = indices_TK.shape[-1]
        # Sorted and gathered instead of added in place: the sums have one order on every device.
        order, counts = self._order(indices_TK)
        rows = hidden_TH if _EVERY_EXPERT.get() else hidden_TH.repeat_interleave(choices, dim=0)[order]
        tokens = order // choices
        outputs = self._run(rows, counts, tokens if _EVERY_EXPERT.get() else None)
        unsorted = outputs[torch.argsort(order)]
        return _weighted_sum(unsorted, weights_TK).to(hidden_TH.dtype)

    @property
    def _is_stacked(self) -> bool:
        return any(tensor is not None for name, tensor in self._parameters.items() if name.startswith(STACK))

    def _stacked_routed(self, hidden_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        flat = indices_TK.flatten()
        order = torch.argsort(flat, stable=True)
        rows = permuted(hidden_TH.repeat_interleave(indices_TK.shape[-1], dim=0), order)
        outputs = self._run_stacked(rows, flat[order])
        return _weighted_sum(permuted(outputs, torch.argsort(order)), weights_TK).to(hidden_TH.dtype)

    def _stacked_sorted(self, rows: Tensor) -> Tensor:
        """Returns the outputs of rows that lie together for each expert, zeros for those that are not routed."""
        routed = rows.any(-1).nonzero().flatten()
        outputs = self._run_stacked(rows[routed], routed // (len(rows) // len(self)))
        return outputs.new_zeros(len(rows), outputs.shape[-1]).index_put((routed,), outputs)

    def _run_stacked(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Returns the outputs for rows whose experts, given for each row, ascend."""
        numbers = torch.arange(len(self), device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)

        def project(leaf: str, x: Tensor) -> Tensor:
            bias = self._parameters.get(f"{STACK}{leaf}{BIAS}")
            output = grouped_linear(x, self._parameters[STACK + leaf], ends)  # type: ignore[arg-type]
            return output if bias is None else output + bias[experts]

        first: Any = self[0]
        return project(first.narrow, first.activate(*(project(leaf, rows) for leaf in first.wide)))

    def token_counts(self, hidden_TH: Tensor, indices_TK: Tensor | None = None, *_weights: Tensor) -> Tensor:
        """Returns (E,) int64: how many tokens reach each expert in a call with these arguments."""
        if indices_TK is None:
            return hidden_TH.view(len(self), -1, hidden_TH.shape[-1]).any(-1).sum(1)
        return torch.bincount(indices_TK.flatten(), minlength=len(self))[: len(self)]

    def _order(self, indices_TK: Tensor) -> tuple[Tensor, list[int]]:
        """Returns the positions of (token, choice) pairs sorted by expert, and how many each expert has."""
        flat = indices_TK.flatten()
        return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=len(self)).tolist()

    def _run(self, rows: Tensor, counts: list[int], tokens: Tensor | None) -> Tensor:
        """Returns the outputs for rows that are sorted by expert; with `tokens`, each expert runs on all rows first.

        Args:
            tokens: index of each sorted pair's row, if `rows` are the tokens themselves.
        """
        pieces = (rows if tokens is None else tokens).split(counts)
        outputs = []
        for expert, piece in zip(self, pieces, strict=True):
            if tokens is not None:
                outputs.append(expert(rows)[piece])
            elif len(piece):
                outputs.append(expert(piece))
        return torch.cat(outputs)

    def _forward_sorted(self, rows: Tensor) -> Tensor:
        """Returns the outputs of rows that lie together for each expert.

        Rows of zeros are tokens that were not routed here: they give zeros, since no projection has a bias.
        """
        outputs = []
        for expert, piece in zip(self, rows.view(len(self), -1, rows.shape[-1]), strict=True):
            routed = piece.any(-1)
            output = torch.zeros_like(piece)
            if bool(routed.any()):
                output = output.index_put((routed.nonzero().flatten(),), expert(piece[routed]))
            outputs.append(output)
        return torch.cat(outputs)


@contextlib.contextmanager
def every_expert_sees_all_tokens() -> Iterator[None]:
    """While it lasts, each expert also runs on the tokens that are not routed to it; outputs stay the same."""
    token = _EVERY_EXPERT.set(True)
    try:
        yield
    finally:
        _EVERY_EXPERT.reset(token)


def fused_experts(model: nn.Module) -> dict[str, FusedLayout]:
    """Returns module name -> layout, for the modules of a model that fuse their experts in a known way."""
    found = {name: fused_layout(module) for name, module in model.named_modules()}
    return {name: layout for name, layout in found.items() if layout is not None}


def with_linear_experts(
    model: nn.Module, experts: Mapping[str, FusedLayout], leaves: Mapping[str, tuple[str, str, str]]
) -> nn.Module:
    """Returns a model whose experts are linear layers. The given model stays as it is; all else is shared with it.

    Args:
        experts: what `fused_experts` returned.
        leaves: module name -> names of an expert's gate, up and down projections.
    """
    copies: dict[str, nn.Module] = {}
    for name, layout in experts.items():
        parent = _copied(model, name.rpartition(".")[0], copies)
        parent._modules[name.rpartition(".")[2]] = LinearExperts(model.get_submodule(name), layout, leaves[name])
    return copies.get("", model)


def _copied(model: nn.Module, name: str, copies: dict[str, nn.Module]) -> nn.Module:
    """Returns a shallow copy of a module, put into copies of everything above it."""
    if name not in copies:
        twin = copy.copy(model.get_submodule(name))
        twin._modules = dict(twin._modules)
        copies[name] = twin
        if name:
            above, _, leaf = name.rpartition(".")
            _copied(model, above, copies)._modules[leaf] = twin
    return copies[name]


def _weighted_sum(outputs: Tensor, weights_TK: Tensor) -> Tensor:
    """Returns (T, H): the outputs of each token's experts, which follow each other, times their weights, added."""
    weighted = outputs * weights_TK.reshape(-1, 1)
    return weighted.view(-1, weights_TK.shape[-1], weighted.shape[-1]).sum(1)


def _linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _activation_of(fused: nn.Module, layout: FusedLayout) -> Callable[..., Tensor]:
    """Returns what lies between the projections: a function of the gate's and the up projection's output, or of one."""
    if not layout.gated:
        return fused.act_fn  # type: ignore[return-value]
    if not hasattr(type(fused), "_apply_gate"):
        return functools.partial(_gated, fused.act_fn)
    bare = copy.copy(fused)  # its settings without its weights
    bare._parameters = {}
    return functools.partial(_gated_by, bare, layout.interleaved)


def _gated(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act_fn(gate) * up


def _gated_by(bare: Any, interleaved: bool, gate: Tensor, up: Tensor) -> Tensor:
    """Returns what the original's own gating makes of both, which it wants in one tensor."""
    joined = torch.stack([gate, up], -1).flatten(-2) if interleaved else torch.cat([gate, up], -1)
    return bare._apply_gate(joined)
