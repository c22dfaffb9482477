"""One block as tuners see it: a forward pass whose weights can be replaced, and its layers by name.

Shape letters: N samples, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from auto_round.calls import BlockCalls, moved_to
from auto_round.models.experts import LinearExperts

InputQuantizer = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One decoder layer, or several that are tuned together, with their tensors on the compute device.

    Attributes:
        names: module names, e.g. ("model.layers.0",).
        modules: the modules; they serve as code only and are never changed.
        calls: how the model calls each.
        tensors: full parameter and buffer names -> tensors in their stored precision; a forward pass converts those
            that are not replaced, so that no second copy of the weights stays while they are tuned.
        input_quantizers: full weight name -> what its layer's input passes through first; empty for 16 bits.
        shows_all_experts: statistics see all tokens at each expert, also those that are routed to others.
        recomputes: attention and MLP keep nothing for the backward pass and run again for it, one after the other.
        stacks: full name of a tensor that holds a parameter of all experts -> the names of its parts, one for each
            expert. Either may be replaced. `join_experts` makes them.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    calls: tuple[BlockCalls, ...]
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    input_quantizers: Mapping[str, InputQuantizer] = dataclasses.field(default_factory=dict)
    shows_all_experts: bool = False
    recomputes: bool = False
    stacks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]}..{self.names[-1].rsplit('.', 1)[-1]}"

    @property
    def runs(self) -> bool:
        """Whether the model calls any of it for the calibration samples."""
        return any(calls.runs for calls in self.calls)

    def forward(
        self,
        hidden_NTH: Tensor,
        samples: Tensor,
        replaced: Mapping[str, Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
        call: Callable[..., Any] = functional_call,
    ) -> Tensor:
        """Returns the block's output for some samples, with some parameters replaced (full names).

        Args:
            arguments: keyword arguments in place of the model's own.
            call: what runs a module with given tensors; compiled, it knows no names, so that blocks share what it has
                compiled.
        """
        replaced = replaced or {}
        for name, module, calls in zip(self.names, self.modules, self.calls, strict=True):
            if not calls.runs:
                continue
            args, kwargs = calls.for_samples(samples, self.device, self.dtype)
            kwargs = {**kwargs, **(arguments or {})}
            with self._quantized_inputs(), self._recomputed_parts(module):
                state = self._state(module, name + ".", replaced)
                output = call(module, state, (hidden_NTH, *args), kwargs)
            hidden_NTH = output[0] if isinstance(output, tuple) else output
        return hidden_NTH

    def stacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the same tensors, those of all experts joined where all are there."""
        joined = dict(tensors)
        for stack, parts in self.stacks.items():
            if all(part in joined for part in parts):
                joined[stack] = torch.stack([joined.pop(part) for part in parts])
        return joined

    def without(self, names: Collection[str]) -> Block:
        """Returns a block that lacks some tensors; forward passes have to bring them."""
        broken = {stack for stack, parts in self.stacks.items() if any(part in names for part in parts)}
        in_broken = {part for stack in broken for part in self.stacks[stack]}
        kept = {
            name: tensor.clone() if name in in_broken else tensor  # else a view would keep all of them
            for name, tensor in self.tensors.items()
            if name not in names and name not in broken
        }
        return dataclasses.replace(self, tensors=kept)

    def _state(self, module: nn.Module, dot: str, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what a module runs with, by name below it. Of a stack and its parts it gets the parts if some are
        watched, else the stack.

        Args:
            dot: the module's name and a dot.
        """
        own = {name: tensor for name, tensor in self.tensors.items() if name.startswith(dot)}
        given = {name: tensor for name, tensor in replaced.items() if name.startswith(dot)}
        for stack, parts in self.stacks.items():
            if not stack.startswith(dot):
                continue
            experts: Any = module.get_submodule(stack.rpartition(".")[0].removeprefix(dot))
            whole = own.pop(stack, None)
            if experts.is_watched:
                given |= zip(parts, given.pop(stack).unbind(0), strict=True) if stack in given else {}
                continue
            held = {part: own.pop(part) for part in parts if part in own}
            if any(part in given for part in parts):
                both = held | given
                given[stack] = torch.stack([moved_to(both[part], self.device, self.dtype) for part in parts])
                given = {name: tensor for name, tensor in given.items() if name not in set(parts)}
            elif stack not in given and whole is not None:
                own[stack] = whole
        moved = {name: moved_to(t, self.device, self.dtype) for name, t in own.items() if name not in given}
        return {name.removeprefix(dot): tensor for name, tensor in (moved | given).items()}

    def layers(self, weights: Iterable[str]) -> dict[str, nn.Module]:
        """Returns weight name -> the module that it belongs to, for those that lie in the block."""
        found = {}
        for name, module in zip(self.names, self.modules, strict=True):
            dot = name + "."
            for weight in weights:
                layer = weight.removesuffix(".weight")
                if layer == name:
                    found[weight] = module
                elif layer.startswith(dot):
                    found[weight] = module.get_submodule(layer[len(dot) :])
        return found

    def experts(self) -> dict[str, LinearExperts]:
        """Returns the lists of experts in the block by full name."""
        return {
            f"{name}.{below}": child
            for name, module in zip(self.names, self.modules, strict=True)
            for below, child in module.named_modules()
            if isinstance(child, LinearExperts)
        }

    @contextlib.contextmanager
    def _quantized_inputs(self) -> Iterator[None]:
        """Puts the input quantizers before their layers for the time of one forward pass."""
        handles = []
        try:
            for weight, layer in self.layers(self.input_quantizers).items():
                hook = functools.partial(_pass_through, self.input_quantizers[weight])
                handles.append(layer.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _recomputed_parts(self, module: nn.Module) -> Iterator[None]:
        """Makes the parts of a module that hold several layers forget, for the time of one forward pass."""
        wanted = self.recomputes and torch.is_grad_enabled()
        parts = [part for part in module.children() if any(True for _ in part.children())] if wanted else []
        try:
            for part in parts:
                part.__dict__["forward"] = functools.partial(self._run_forgetfully, part)
            yield
        finally:
            for part in parts:
                part.__dict__.pop("forward", None)

    def _run_forgetfully(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Runs a part with the tensors that it has now, also when it runs again in the backward pass."""
        own = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
        state = dict(own)

        def run(*args: Any, **kwargs: Any) -> Any:
            stand_in = part.__dict__.pop("forward", None)
            # The second time there is no stand-in, and the quantizers of its inputs are gone as well.
            quantized = contextlib.nullcontext() if stand_in is not None else self._quantized_inputs()
            try:
                with quantized:
                    return functional_call(part, state, args, kwargs)
            finally:
                if stand_in is not None:
                    part.__dict__["forward"] = stand_in

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def join_experts(
    names: Sequence[str], modules: Sequence[nn.Module], tensors: dict[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Makes the tensors of all experts parts of one, which is added, and returns `Block.stacks`.

    Args:
        names, modules: of the blocks.
        tensors: by full name; changed in place, so that no second copy of all experts exists.
    """
    stacks = {}
    for name, module in zip(names, modules, strict=True):
        for below, experts in module.named_modules():
            for stack, members in experts.stack_members().items() if isinstance(experts, LinearExperts) else ():
                parts = tuple(f"{name}.{below}.{member}" for member in members)
                if all(part in tensors for part in parts):
                    stacks[f"{name}.{below}.{stack}"] = parts
    for stack, parts in stacks.items():
        tensors[stack] = torch.stack([tensors.pop(part) for part in parts])
        tensors |= zip(parts, tensors[stack].unbind(0), strict=True)
    return stacks


def _pass_through(quantizer: InputQuantizer, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])
