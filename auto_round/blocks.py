"""Runs a model block by block: how the model calls each block, one block's tensors at a time, two activation chains.

The identity pass: every block is replaced by a recorder that returns its input, and the model's own forward runs once
over the calibration tokens. That gives the input of the first block and, for each block, the arguments the model itself
passes (masks, rotary tables), without touching a block's weights. Modules are used through torch's functional_call, so
neither a user's model nor a model on the meta device is ever changed.

Shape letters: N samples, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round import distributed
from auto_round.calibration import CalibrationSet
from auto_round.checkpoint import WeightSource
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.models.base import has_tied_head, head_name
from auto_round.models.experts import LinearExperts

InputQuantizer = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlockCalls:
    """The arguments, besides the hidden states, that the model passes to one block.

    Attributes:
        shared: nested structure of arguments with `None` where a tensor differs from sample to sample.
        per_sample: flat position -> (N, ...) tensor for those, in the order of the flattened structure.
        spec: structure of (args, kwargs).
    """

    shared: tuple[Any, ...]
    per_sample: Mapping[int, Tensor]
    spec: Any

    def for_samples(self, samples: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
        """Returns positional and keyword arguments for some samples, floating tensors in `dtype`."""
        leaves = [
            self.per_sample[i][samples.to(self.per_sample[i].device)] if i in self.per_sample else leaf
            for i, leaf in enumerate(self.shared)
        ]
        moved = [_to(leaf, device, dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return torch.utils._pytree.tree_unflatten(moved, self.spec)


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
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    calls: tuple[BlockCalls, ...]
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    input_quantizers: Mapping[str, InputQuantizer] = dataclasses.field(default_factory=dict)
    shows_all_experts: bool = False

    @property
    def name(self) -> str:
        """The name for messages."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]}..{self.names[-1].rsplit('.', 1)[-1]}"

    def forward(
        self,
        hidden_NTH: Tensor,
        samples: Tensor,
        replaced: Mapping[str, Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Returns the block's output for some samples, with some parameters replaced (full names).

        Args:
            arguments: keyword arguments in place of the model's own.
        """
        replaced = replaced or {}
        for name, module, calls in zip(self.names, self.modules, self.calls, strict=True):
            dot = name + "."
            own = {key: tensor for key, tensor in self.tensors.items() if key.startswith(dot)}
            state = {k[len(dot) :]: _to(t, self.device, self.dtype) for k, t in own.items() if k not in replaced}
            state.update({k[len(dot) :]: t for k, t in replaced.items() if k.startswith(dot)})
            args, kwargs = calls.for_samples(samples, self.device, self.dtype)
            kwargs = {**kwargs, **(arguments or {})}
            with self._quantized_inputs():
                output = functional_call(module, state, (hidden_NTH, *args), kwargs)
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


def _pass_through(quantizer: InputQuantizer, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])


class BlockStream:
    """Walks the blocks of a model with two chains of activations: original, and as the quantized blocks give them.

    Args:
        source: where weights come from.
        groups: names of the blocks, those that are tuned together in one tuple.
        data: calibration tokens.
        device, dtype: where and in what precision blocks run.
        storage: device that the chains are kept on.
        batch_size: samples of one forward pass.
        quantized_chain: keep the second chain; else blocks are tuned on original inputs.
        shows_all_experts: as in `Block`.
    """

    def __init__(
        self,
        source: WeightSource,
        groups: Sequence[tuple[str, ...]],
        data: CalibrationSet,
        *,
        device: torch.device,
        dtype: torch.dtype,
        storage: torch.device,
        batch_size: int,
        quantized_chain: bool,
        shows_all_experts: bool = False,
    ) -> None:
        self.source, self.groups, self.data = source, groups, data
        self.device, self.dtype, self.storage = device, dtype, storage
        self.batch_size, self.quantized_chain = batch_size, quantized_chain
        self.shows_all_experts = shows_all_experts
        self._skeleton = self._load_skeleton()
        self.original, self._calls = self._identity_pass()
        self._skeleton = {}  # embeddings can be large; head_inputs loads them again
        self.quantized = self.original

    def load(self, index: int) -> Block:
        """Returns one group of blocks, its tensors on the compute device."""
        names = self.groups[index]
        stored: dict[str, Tensor] = {}
        for name in names:
            stored.update(self.source.tensors(name))
        modules = tuple(self.source.model.get_submodule(name) for name in names)
        tensors = {key: tensor.to(self.device) for key, tensor in stored.items()}
        calls = tuple(self._calls[name] for name in names)
        return Block(names, modules, calls, tensors, self.device, self.dtype, shows_all_experts=self.shows_all_experts)

    def batches(self) -> list[slice]:
        """Returns the samples of each forward pass; fixed, so that results do not depend on ranks or resuming."""
        count = len(self.data)
        return [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    @torch.no_grad()
    def run(self, block: Block, inputs_NTH: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the outputs of a block for all samples, on the storage device; ranks share the work.

        Raises:
            CalibrationError: an output is not finite; block and samples are named.
        """
        outputs = torch.empty_like(inputs_NTH)
        pieces = self.batches()
        for index, piece in enumerate(pieces):
            if index % distributed.world_size() != distributed.rank():
                continue
            samples = torch.arange(piece.start, piece.stop)
            outputs[piece] = block.forward(inputs_NTH[piece].to(self.device), samples, replaced).to(self.storage)
        distributed.fill_from_owners(outputs, pieces)
        if not torch.isfinite(outputs).all():
            bad = (~torch.isfinite(outputs).flatten(1).all(1)).nonzero().flatten().tolist()
            raise CalibrationError(
                f"{block.name} gives values that are not finite for samples {bad[:5]}. The model overflows in "
                f"{str(self.dtype).removeprefix('torch.')}: run with --disable_amp"
            )
        return outputs

    def advance(self, block: Block, targets_NTH: Tensor, replaced: Mapping[str, Tensor]) -> None:
        """Moves both chains past a finished block.

        Args:
            targets_NTH: the original outputs of the block.
            replaced: dequantized weights and tuned parameters by full name.
        """
        self.quantized = self.run(block, self.quantized, replaced) if self.quantized_chain else targets_NTH
        self.original = targets_NTH

    @torch.no_grad()
    def head_inputs(self, head: str, chain_NTH: Tensor) -> Tensor:
        """Returns what the output layer sees, (N, T, H), when the last block gives `chain_NTH`."""
        self._skeleton = self._load_skeleton()
        collected: list[Tensor] = []
        names = [name for group in self.groups for name in group]
        with _replaced_modules(self.source.model, names, lambda _name: _Identity()):
            last = self.source.model.get_submodule(names[-1])
            with _replaced_modules(self.source.model, [head], lambda _name: _Identity(collected)):
                for piece in self.batches():
                    rows = chain_NTH[piece].to(self.device)
                    last.output = rows if self.data.attention_mask is None else torch.cat([rows, rows[:1]])
                    self._forward_skeleton(piece)
        sizes = [piece.stop - piece.start for piece in self.batches()]
        return torch.cat([hidden[:size].to(self.storage) for hidden, size in zip(collected, sizes, strict=True)])

    def _load_skeleton(self) -> dict[str, Tensor]:
        """Returns what lies outside the blocks, without the output layer, which no pass here runs."""
        head = head_name(self.source.model)
        tied = has_tied_head(self.source.model)
        outside = outside_tensors(self.source, self.groups)
        kept = {n: t for n, t in outside.items() if tied or head is None or not n.startswith(head + ".")}
        return {name: _to(tensor, self.device, self.dtype) for name, tensor in kept.items()}

    def _identity_pass(self) -> tuple[Tensor, dict[str, BlockCalls]]:
        recorders: dict[str, _Recorder] = {}
        names = [name for group in self.groups for name in group]
        head = head_name(self.source.model)
        with (
            torch.no_grad(),
            _replaced_modules(self.source.model, names, lambda n: recorders.setdefault(n, _Recorder())),
            _replaced_modules(self.source.model, [head] if head else [], lambda _name: _Identity()),
        ):
            for piece in self.batches():
                self._forward_skeleton(piece)
        first = recorders[names[0]]
        if not first.hidden:
            raise UnsupportedError(f"{type(self.source.model).__name__} never called {names[0]} in its forward pass")
        extra = 0 if self.data.attention_mask is None else 1
        inputs = torch.cat([hidden[: len(hidden) - extra].to(self.storage) for hidden in first.hidden])
        merged: dict[tuple[int, ...], Any] = {}
        count = len(self.data)
        return inputs, {
            name: _merge_calls(recorder.calls, count, extra, merged) for name, recorder in recorders.items()
        }

    def _forward_skeleton(self, piece: slice) -> None:
        ids = self.data.input_ids[piece]
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": False}
        if self.data.attention_mask is not None:
            ids, mask = _with_padded_row(ids, self.data.attention_mask[piece])
            arguments = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        functional_call(self.source.model, self._skeleton, (), arguments, strict=False)


class _Identity(nn.Module):
    """Returns its input (or `output`, if set), and keeps inputs in `collected`."""

    def __init__(self, collected: list[Tensor] | None = None) -> None:
        super().__init__()
        self.collected, self.output = collected, None

    def forward(self, hidden: Tensor | None = None, *_args: Any, **kwargs: Any) -> Tensor:
        hidden = kwargs["hidden_states"] if hidden is None else hidden
        if self.collected is not None:
            self.collected.append(hidden)
        return hidden if self.output is None else self.output


class _Recorder(nn.Module):
    """Stands in for a block: remembers how it is called, passes hidden states through."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.calls: list[tuple[int, tuple, dict]] = []

    def forward(self, hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        self.hidden.append(hidden)
        self.calls.append((hidden.shape[0], args, kwargs))
        return hidden


@contextlib.contextmanager
def _replaced_modules(model: nn.Module, names: Sequence[str], make: Any) -> Iterator[None]:
    """Puts stand-ins in the place of modules and takes them out again, whatever happens."""
    saved = []
    try:
        for name in names:
            parent = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            original = parent._modules[leaf]
            stand_in = make(name)
            for attribute, value in vars(original).items():  # models read attributes such as attention_type of a layer
                if not attribute.startswith("_") and attribute not in vars(stand_in):
                    stand_in.__dict__[attribute] = value
            saved.append((parent, leaf, original))
            parent._modules[leaf] = stand_in
        yield
    finally:
        for parent, leaf, original in reversed(saved):
            parent._modules[leaf] = original


def _with_padded_row(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a batch with one more row, padded at its end, and its mask.

    A model leaves the mask out for a batch that nothing is padded in. The extra row makes it build one for every
    batch, so that samples of all batches can be mixed later; its results are dropped.
    """
    extra = torch.ones_like(mask[:1])
    extra[:, -1] = False
    return torch.cat([ids, ids[:1]]), torch.cat([mask, extra]).long()


def outside_tensors(source: WeightSource, groups: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns parameters and buffers outside the blocks, by name, tied ones once (functional_call ties them)."""
    inside = tuple(name + "." for group in groups for name in group)
    tensors = {n: source.read(k) for k, n in source.keys().items() if n is not None and not n.startswith(inside)}
    for name, buffer in source.model.named_buffers():
        if not name.startswith(inside) and not buffer.is_meta:
            tensors.setdefault(name, buffer)
    return tensors


def _merge_calls(
    calls: list[tuple[int, tuple, dict]], count: int, extra: int, merged: dict[tuple[int, ...], Any]
) -> BlockCalls:
    """Joins the calls of all batches: tensors that are the same for every sample are kept once.

    Args:
        count: samples of all calls.
        extra: rows at the end of each call that are no samples.
        merged: what was joined for earlier blocks, by identity; blocks mostly get the very same tensors.
    """
    flat = [torch.utils._pytree.tree_flatten((args, kwargs)) for _, args, kwargs in calls]
    sizes = [size for size, _, _ in calls]
    leaves_by_call, spec = [leaves for leaves, _ in flat], flat[0][1]
    shared, per_sample = [], {}
    for position, first in enumerate(leaves_by_call[0]):
        leaf = first
        values = [leaves[position] for leaves in leaves_by_call]
        if isinstance(first, Tensor) and first.ndim > 0 and sum(sizes) - extra * len(sizes) == count:
            if all(v.shape[0] == size for v, size in zip(values, sizes, strict=True)):
                identity = tuple(id(v) for v in values)
                if identity not in merged:
                    rows = [v[: v.shape[0] - extra] for v in values]
                    same = all(torch.equal(v, first[:1].expand_as(v)) for v in rows)
                    merged[identity] = (first[:1], None) if same else (None, torch.cat([v.cpu() for v in rows]))
                leaf, varying = merged[identity]
                if varying is not None:
                    per_sample[position] = varying
        shared.append(leaf)
    return BlockCalls(tuple(shared), per_sample, spec)


def _to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
