"""One block as tuners see it: a forward pass whose weights can be replaced, and its layers by name.

Shape letters: N samples, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
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
            dot = name + "."
            own = {key: tensor for key, tensor in self.tensors.items() if key.startswith(dot)}
            state = {k[len(dot) :]: moved_to(t, self.device, self.dtype) for k, t in own.items() if k not in replaced}
            state.update({k[len(dot) :]: t for k, t in replaced.items() if k.startswith(dot)})
            args, kwargs = calls.for_samples(samples, self.device, self.dtype)
            kwargs = {**kwargs, **(arguments or {})}
            with self._quantized_inputs(), self._recomputed_parts(module):
                output = call(module, state, (hidden_NTH, *args), kwargs)
            hidden_NTH = output[0] if isinstance(output, tuple) else output
        return hidden_NTH

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


def _pass_through(quantizer: InputQuantizer, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])
