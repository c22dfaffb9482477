"""Runs a model block by block: how the model calls each block, one block's tensors at a time, two activation chains.

The identity pass: every block is replaced by a recorder that returns its input, and the model's own forward runs once
over the calibration samples. That gives the input of the first block and, for each block, the arguments the model
itself passes (masks, rotary tables), without touching a block's weights. Modules are used through torch's
functional_call, so neither a user's model nor a model on the meta device is ever changed.

Where a model changes hidden states between two blocks (vision features added to some tokens), its own code does so
here too: it runs again with the block before giving the activations, up to the block behind.

Shape letters: N samples, T tokens, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from auto_round import distributed
from auto_round.block import Block, join_experts
from auto_round.calibration import CalibrationSet
from auto_round.calls import (
    NOT_CALLED,
    BlockCalls,
    GivenWeight,
    IndexedOutputError,
    ReachedError,
    Recorder,
    Replay,
    Trace,
    merge_calls,
    moved_to,
    replaced_modules,
    sample_axes,
)
from auto_round.channels import ChannelMeans
from auto_round.checkpoint import WeightSource
from auto_round.device import empty_near
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.models.base import has_tied_head, head_name
from auto_round.skeleton import outside_tensors, with_padded_row

PAGE_BYTES = 4096


class BlockStream:
    """Walks the blocks of a model with two chains of activations: original, and as the quantized blocks give them.

    Args:
        source: where weights come from.
        groups: names of the blocks, those that are tuned together in one tuple.
        data: calibration samples.
        device, dtype: where and in what precision blocks run.
        storage: device that the chains are kept on.
        batch_size: samples of one forward pass, unless `micro_batch` is set to a divisor of it.
        quantized_chain: keep the second chain; else blocks are tuned on original inputs.
        watched: weights outside the blocks whose input channels are measured; `channel_means` has them then.
        shows_all_experts: as in `Block`.
    Raises:
        UnsupportedError: the model does not call its blocks, or calls them in a way that cannot be streamed.
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
        watched: Sequence[str] = (),
        shows_all_experts: bool = False,
    ) -> None:
        self.source, self.groups, self.data = source, groups, data
        self.device, self.dtype, self.storage = device, dtype, storage
        self.batch_size, self.micro_batch, self.quantized_chain = batch_size, batch_size, quantized_chain
        self.channel_means: dict[str, Tensor] = {}
        self.shows_all_experts = shows_all_experts
        self._skeleton = self._load_skeleton()
        self._with_head: dict[str, Tensor] = {}
        self._as_tuple = False
        self.original: Tensor | None
        try:
            self.original, self._calls, self._changed = self._identity_pass(watched)
        except IndexedOutputError:
            self._as_tuple = True
            self.original, self._calls, self._changed = self._identity_pass(watched)
        self._refuse_changes_within_groups()
        if not self._changed:
            self._skeleton = {}  # embeddings can be large; head_inputs loads them again
        assert self.original is not None
        self.quantized = self.original

    def read(self, index: int) -> dict[str, Tensor]:
        """Returns the tensors of one group of blocks from where they are stored, in host memory.

        May run beside everything but passes of the whole model, which put stand-ins in the blocks' places.
        """
        stored: dict[str, Tensor] = {}
        for name in self.groups[index]:
            stored.update(self.source.tensors(name))
        for tensor in stored.values():
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                # Files are mapped: a look at each page makes the system read it now.
                tensor.detach().reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        return stored

    def load(self, index: int, stored: Mapping[str, Tensor] | None = None) -> Block:
        """Returns one group of blocks, its tensors on the compute device.

        Args:
            stored: what `read` gave, if it has been called already.
        """
        names, stored = self.groups[index], self.read(index) if stored is None else stored
        modules = tuple(self.source.model.get_submodule(name) for name in names)
        tensors = {key: stored.pop(key).to(self.device) for key in list(stored)}
        stacks = join_experts(names, modules, tensors)
        calls = tuple(self._calls[name] for name in names)
        shows = self.shows_all_experts
        return Block(names, modules, calls, tensors, self.device, self.dtype, shows_all_experts=shows, stacks=stacks)

    def keep_on(self, storage: torch.device) -> None:
        """Moves the chains to where they are kept from now on."""
        if storage == self.storage:
            return
        self.storage = storage
        is_one = self.original is self.quantized
        self.quantized = self.stored(self.quantized)
        if self.original is not None:
            self.original = self.quantized if is_one else self.stored(self.original)

    def stored(self, chain_NTH: Tensor) -> Tensor:
        """Returns activations where the chains are kept."""
        if chain_NTH.device.type == self.storage.type:
            return chain_NTH
        return empty_near(self.device, self.storage, chain_NTH.shape, chain_NTH.dtype).copy_(chain_NTH)

    def passes(self) -> list[slice]:
        """Returns the samples of each forward pass: batches, or parts of them if `micro_batch` is smaller."""
        return [part for piece in self.batches() for part in self._parts(piece)]

    def _parts(self, piece: slice) -> list[slice]:
        starts = range(piece.start, piece.stop, self.micro_batch)
        return [slice(start, min(start + self.micro_batch, piece.stop)) for start in starts]

    def batches(self) -> list[slice]:
        """Returns the samples that ranks take in turn; fixed, so that results do not depend on ranks or resuming."""
        count = len(self.data)
        return [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def run(
        self,
        block: Block,
        inputs_NTH: Tensor,
        replaced: Mapping[str, Tensor] | None = None,
        *,
        into: Tensor | None = None,
    ) -> Tensor:
        """Returns the outputs of a block for all samples, on the storage device; ranks share the work.

        Args:
            into: takes the outputs; may be the inputs themselves, whose samples are read before they are overwritten.
        Raises:
            CalibrationError: an output is not finite; block and samples are named.
        """
        outputs = empty_near(self.device, self.storage, inputs_NTH.shape, inputs_NTH.dtype) if into is None else into
        finite = torch.ones(len(inputs_NTH), dtype=torch.bool, device=self.device)
        replaced = block.stacked(replaced or {})
        pieces = self.batches()
        for piece in pieces[distributed.rank() :: distributed.world_size()]:
            self._run_piece(block, piece, inputs_NTH, replaced, outputs, finite)
        # Reading the flags waits for the device, so the copies to host memory are over, too.
        bad = (~distributed.all_of(finite)).nonzero().flatten().tolist()
        if bad:
            raise CalibrationError(
                f"{block.name} gives values that are not finite for samples {bad[:5]}. The model overflows in "
                f"{str(self.dtype).removeprefix('torch.')}: run with --disable_amp"
            )
        return distributed.fill_from_owners(outputs, pieces)

    @torch.no_grad()
    def _run_piece(
        self,
        block: Block,
        piece: slice,
        inputs_NTH: Tensor,
        replaced: Mapping[str, Tensor] | None,
        outputs_NTH: Tensor,
        finite_N: Tensor,
    ) -> None:
        """Writes the outputs of one batch, and whether each sample's are finite: a pass over all would take more."""
        for part in self._parts(piece):
            samples = torch.arange(part.start, part.stop)
            found = block.forward(inputs_NTH[part].to(self.device), samples, replaced)
            finite_N[part] = torch.isfinite(found).flatten(1).all(1)
            outputs_NTH[part].copy_(found, non_blocking=True)

    def targets(self, block: Block, *, keeps_inputs: bool) -> Tensor:
        """Returns the original outputs of a block.

        Args:
            keeps_inputs: the original inputs stay; else the outputs take their place if nothing else needs them.
        """
        assert self.original is not None
        if keeps_inputs or not self.quantized_chain:
            return self.run(block, self.original)
        original, self.original = self.original, None
        return self.run(block, original, into=None if original is self.quantized else original)

    def advance(self, block: Block, targets_NTH: Tensor, replaced: Mapping[str, Tensor]) -> None:
        """Moves both chains past a finished block; its outputs overwrite the inputs that it was tuned on.

        Args:
            targets_NTH: the original outputs of the block.
            replaced: dequantized weights and tuned parameters by full name.
        """
        self.original = None
        quantized = targets_NTH
        if self.quantized_chain:
            quantized = self.run(block, self.quantized, replaced, into=self.quantized)
        following = list(self.groups).index(block.names) + 1
        original = self.before(following, targets_NTH)
        self.original = original
        self.quantized = self.before(following, quantized) if self.quantized_chain else original

    @torch.no_grad()
    def before(self, index: int, chain_NTH: Tensor) -> Tensor:
        """Returns what group `index` sees when the blocks before it give `chain_NTH`."""
        name = self.groups[index][0] if index < len(self.groups) else None
        if name is None or name not in self._changed:
            return chain_NTH
        names = self._names()
        previous = [n for n in names[: names.index(name)] if self._calls[n].runs][-1]
        collected: list[Tensor] = []

        def stand_in(own: str) -> Replay:
            return Replay(collected if own == name else None, as_tuple=self._as_tuple, stops=own == name)

        with replaced_modules(self.source.model, names, stand_in):
            self._replay(previous, chain_NTH, collected)
        return self._without_extra(collected)

    @torch.no_grad()
    def head_inputs(self, head: str, chain_NTH: Tensor) -> Tensor:
        """Returns what the output layer sees, (N, T, H), when the last block gives `chain_NTH`."""
        self._skeleton = self._load_skeleton()
        collected: list[Tensor] = []
        last = [name for name in self._names() if self._calls[name].runs][-1]
        with (
            replaced_modules(self.source.model, self._names(), lambda _name: Replay(as_tuple=self._as_tuple)),
            replaced_modules(self.source.model, [head], lambda _name: Replay(collected)),
        ):
            self._replay(last, chain_NTH, collected)
        return self._without_extra(collected)

    def logits(self, hidden_NTH: Tensor, samples: Tensor, head: Tensor | None = None) -> Tensor:
        """Returns (N, T, V) what the model predicts for some samples when its last block gives `hidden_NTH`.

        Args:
            hidden_NTH: on the compute device; the result is differentiable in it, and in `head`.
            head: (V, H) in place of the output layer's weight.
        """
        model, name = self.source.model, head_name(self.source.model)
        self._with_head = self._with_head or self._load_skeleton(with_head=True)
        bias = self._with_head.get(f"{name}.bias")
        last = [block for block in self._names() if self._calls[block].runs][-1]
        rows = torch.cat([hidden_NTH, hidden_NTH[:1]]) if self._extra else hidden_NTH
        with (
            replaced_modules(model, self._names(), lambda _name: Replay(as_tuple=self._as_tuple)),
            replaced_modules(model, [name] if name and head is not None else [], lambda _name: GivenWeight(head, bias)),
        ):
            stand_in: Any = model.get_submodule(last)
            stand_in.output = rows
            return self._forward_skeleton(samples, self._with_head).logits[: len(hidden_NTH)]

    @property
    def changes_between_blocks(self) -> bool:
        """Whether the model changes hidden states between two blocks, so that no block gives the next its input."""
        return bool(self._changed)

    def _replay(self, name: str, chain_NTH: Tensor, collected: list[Tensor]) -> None:
        """Runs the skeleton with a stand-in that gives the activations of a chain; what is collected is stored."""
        stand_in: Any = self.source.model.get_submodule(name)
        for piece in self._pieces():
            rows = chain_NTH[piece].to(self.device)
            stand_in.output = torch.cat([rows, rows[:1]]) if self._extra else rows
            with contextlib.suppress(ReachedError):
                self._forward_skeleton(torch.arange(piece.start, piece.stop))
            self._store(collected)

    def _store(self, *collected: list[Tensor]) -> None:
        """Moves what a pass has collected to the storage device, so that no more than one pass's lies elsewhere."""
        for hidden in collected:
            hidden[:] = [tensor.to(self.storage) for tensor in hidden]

    def _without_extra(self, collected: list[Tensor]) -> Tensor:
        """Returns (N, T, H), joined where the chains are kept."""
        parts = [hidden[: len(hidden) - self._extra] for hidden in collected]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        joined = empty_near(self.device, self.storage, shape, parts[0].dtype)
        torch.cat(parts, out=joined)
        return joined

    def _names(self) -> list[str]:
        return [name for group in self.groups for name in group]

    @property
    def _extra(self) -> int:
        """Rows at the end of each pass of the skeleton that are no samples, see `with_padded_row`."""
        return 1 if self.data.attention_mask is not None and self.data.media is None else 0

    def _pieces(self) -> list[slice]:
        """Returns the samples of each pass of the skeleton: pictures go one sample at a time, for they differ."""
        return self.batches() if self.data.media is None else [slice(i, i + 1) for i in range(len(self.data))]

    def _load_skeleton(self, *, with_head: bool = False) -> dict[str, Tensor]:
        """Returns what lies outside the blocks, without the output layer unless it is to run."""
        head = head_name(self.source.model)
        keeps_head = with_head or head is None or has_tied_head(self.source.model)
        outside = outside_tensors(self.source, self.groups)
        kept = {n: t for n, t in outside.items() if keeps_head or not n.startswith(f"{head}.")}
        return {name: moved_to(tensor, self.device, self.dtype) for name, tensor in kept.items()}

    @torch.no_grad()
    def _identity_pass(self, watched: Sequence[str]) -> tuple[Tensor, dict[str, BlockCalls], set[str]]:
        """Returns the input of the first block, how each is called, and those that get something changed."""
        first = torch.zeros(1, dtype=torch.int64)
        one, _ = self._record([first])
        two, _ = self._record([first.repeat(2)])
        pieces = [torch.arange(piece.start, piece.stop) for piece in self._pieces()]
        with ChannelMeans(self.source.model, watched) as means:
            recorders, changed = self._record(pieces)
        self.channel_means = means.values()
        names = self._names()
        called = [name for name in names if recorders[name].calls]
        partly = [name for name in called if len(recorders[name].calls) != len(pieces)]
        model = type(self.source.model).__name__
        if not called:
            raise UnsupportedError(f"{model} never called {names[0]} in its forward pass")
        if partly:
            raise UnsupportedError(f"{model} calls {partly[0]} for some of the calibration samples only")
        merged: dict[tuple[int, ...], Any] = {}
        calls = dict.fromkeys(names, NOT_CALLED)
        for name in called:
            axes = sample_axes(one[name], two[name])
            calls[name] = merge_calls(recorders[name], axes, self._extra, merged, joins_equal=self.data.media is None)
        return self._without_extra(recorders[called[0]].hidden), calls, changed

    def _record(self, pieces: Sequence[Tensor]) -> tuple[dict[str, Recorder], set[str]]:
        """Returns recorders that have seen passes over some samples, and the blocks that got something changed."""
        recorders: dict[str, Recorder] = {}
        trace, head = Trace(), head_name(self.source.model)

        def stand_in(name: str) -> Recorder:
            return recorders.setdefault(name, Recorder(name, trace, as_tuple=self._as_tuple))

        with (
            replaced_modules(self.source.model, self._names(), stand_in),
            replaced_modules(self.source.model, [head] if head else [], lambda _name: Replay()),
        ):
            for samples in pieces:
                trace.begin()
                self._forward_skeleton(samples)
                self._store(*(recorder.hidden for recorder in recorders.values()))
        return recorders, trace.changed

    def _refuse_changes_within_groups(self) -> None:
        inside = self._changed & {name for group in self.groups for name in group[1:]}
        if inside:
            raise UnsupportedError(
                f"{type(self.source.model).__name__} changes hidden states before {sorted(inside)[0]}, so it cannot be "
                "tuned together with the block before it. Use nblocks=1"
            )

    def _forward_skeleton(self, samples: Tensor, skeleton: Mapping[str, Tensor] | None = None) -> Any:
        ids, arguments = self.data.input_ids[samples], {}
        if self.data.attention_mask is not None:
            mask = self.data.attention_mask[samples]
            ids, mask = with_padded_row(ids, mask) if self._extra else (ids, mask.long())
            arguments["attention_mask"] = mask
        arguments = {"input_ids": ids, **arguments, **self.data.media_of(samples)}
        moved = {name: moved_to(tensor, self.device, self.dtype) for name, tensor in arguments.items()}
        tensors: Any = self._skeleton if skeleton is None else skeleton
        return functional_call(self.source.model, tensors, (), {**moved, "use_cache": False}, strict=False)
