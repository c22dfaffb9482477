"""What quantization cost: the original and the quantized model run side by side, block by block, over held-out text.

Both are streams of blocks, the second one over dequantized weights, so that memory is that of two blocks and of the
activations of a few samples, whatever the model's size. Without text, errors of weights are all that can be said.

Shape letters: N samples, T tokens, H hidden, V words, O and I outputs and inputs of a layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.blocks import BlockStream
from auto_round.calibration import CalibrationSet
from auto_round.channels import ChannelMeans
from auto_round.device import compute_device
from auto_round.errors import AutoRoundError
from auto_round.memory import release_freed
from auto_round.outside import output_layers
from auto_round.plan import Plan
from auto_round.quality.errors_of_weights import LayerError, weight_error
from auto_round.quality.held_out import stored_samples
from auto_round.quality.predictions import Predictions, compared, summarized
from auto_round.quality.quantized_source import QuantizedSource
from auto_round.session import Session
from auto_round.store import RunStore
from auto_round.tensors import BlockResult
from auto_round.tuning import quantizers_of, with_input_quantizers

logger = logging.getLogger(__name__)

LOGITS_AT_A_TIME = 1 << 26  # numbers; about six float32 tensors of them are alive, a sample is not cut
ROWS_AT_A_TIME = 8  # samples whose errors are summed at a time

OpenStream = Callable[[Session, CalibrationSet], BlockStream]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockError:
    """Squared error of a group of blocks' output, relative to the squares of the original output, at real tokens.

    Attributes:
        output: behind the quantized blocks before it: what has added up.
        own: behind the original blocks: what this one adds.
    """

    output: float
    own: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run cost in quality.

    Attributes:
        text: what the held-out text is; "" if there is none.
        predictions: how the quantized model predicts it; None if that could not be measured.
        blocks: first name of a group of blocks -> error of its output.
        layers: weight name -> its error.
        missing: what was not measured, and why.
    """

    text: str = ""
    predictions: Predictions | None = None
    blocks: Mapping[str, BlockError] = dataclasses.field(default_factory=dict)
    layers: Mapping[str, LayerError] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()


def measure(session: Session, store: RunStore, open_stream: OpenStream) -> Measured:
    """Returns what can be measured of a finished run. What cannot is said in the result: it is no error of the run.

    Args:
        session: its source gives the original weights.
        open_stream: opens a stream of blocks over the source of a session.
    """
    started = time.monotonic()
    samples, about = stored_samples(store)
    measured = None
    if samples is not None:
        try:
            measured = _on_text(session, store, samples, about, open_stream)
        except (AutoRoundError, RuntimeError) as error:  # a model that cannot be streamed, or no memory left for it
            about = f"the model could not be run over the text: {str(error).splitlines()[0]}"
            logger.warning("quality report: %s", about)
    if measured is None:
        measured = Measured(layers=_without_text(session, store), missing=(about,))
    logger.info("measured quality in %.1f s", time.monotonic() - started)
    return measured


def _without_text(session: Session, store: RunStore) -> dict[str, LayerError]:
    """Returns errors of all quantized weights, read one block after the other."""
    quantized = _quantized_source(session, store)
    errors: dict[str, LayerError] = {}
    for group in session.plan.groups:
        stored: dict[str, Tensor] = {}
        for name in group:
            stored.update(session.source.tensors(name))
        errors |= _layer_errors(session.plan, stored, quantized.result(group[0]), {}, quantized.device)
        release_freed()
    return errors | _errors_outside(session, quantized, {})


def _quantized_source(session: Session, store: RunStore, dtype: torch.dtype = torch.float32) -> QuantizedSource:
    device = compute_device(session.config.device)
    return QuantizedSource(session.source, session.plan, store, device=device, dtype=dtype)


def _on_text(
    session: Session, store: RunStore, samples: CalibrationSet, about: str, open_stream: OpenStream
) -> Measured:
    original = open_stream(session, samples)
    source = _quantized_source(session, store, original.dtype)
    quantized = open_stream(dataclasses.replace(session, source=source), samples)
    blocks: dict[str, BlockError] = {}
    layers: dict[str, LayerError] = {}
    for index in range(len(session.plan.groups)):
        _pass_block(session.plan, index, original, quantized, blocks, layers)
        release_freed()
    words = f"{len(samples)} windows, {samples.n_tokens} tokens: {about}"
    head = session.plan.structure.head
    if head is None:
        layers |= _errors_outside(session, source, {})
        return Measured(text=words, blocks=blocks, layers=layers, missing=("the model has no output layer",))
    per_token, head_means = _predictions(session.plan, original, quantized, source)
    predictions = summarized(per_token, samples.attention_mask)
    layers |= _errors_outside(session, source, head_means)
    return Measured(text=words, predictions=predictions, blocks=blocks, layers=layers)


@torch.no_grad()
def _pass_block(
    plan: Plan,
    index: int,
    original: BlockStream,
    quantized: BlockStream,
    blocks: dict[str, BlockError],
    layers: dict[str, LayerError],
) -> None:
    """Moves both streams past a group of blocks; adds its errors and those of its layers."""
    names, source = plan.groups[index], _own_source(quantized)
    mask, seen = original.data.attention_mask, original.original
    assert seen is not None
    assert quantized.original is not None
    result = source.result(names[0])
    block = original.load(index)
    with ChannelMeans(original.source.model, list(result.weights) if block.runs else []) as means:
        targets = original.run(block, seen)
    layers |= _layer_errors(plan, block.tensors, result, means.values(), original.device)
    original.advance(block, targets, {})
    del block
    block = with_input_quantizers(quantized.load(index), quantizers_of(result))
    if not block.runs:
        quantized.advance(block, quantized.original, {})
        return
    own = relative_error(targets, quantized.run(block, seen), mask)
    outputs = quantized.run(block, quantized.original)
    quantized.advance(block, outputs, {})
    blocks[names[0]] = BlockError(relative_error(targets, outputs, mask), own)


def _own_source(stream: BlockStream) -> QuantizedSource:
    assert isinstance(stream.source, QuantizedSource)
    return stream.source


def relative_error(wanted_NTH: Tensor, found_NTH: Tensor, mask_NT: Tensor | None) -> float:
    """Returns the squared difference over the squares of what is wanted, both summed over real tokens in float32."""
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(wanted_NTH), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        wanted, found = wanted_NTH[rows].float(), found_NTH[rows].float()
        real = torch.ones_like(wanted[..., :1]) if mask_NT is None else mask_NT[rows].to(wanted)[..., None]
        sums = [((found - wanted).square() * real).sum(), (wanted.square() * real).sum()]
        totals += torch.stack(sums).double().cpu()
    return float(totals[0] / totals[1]) if totals[1] > 0 else 0.0


def _layer_errors(
    plan: Plan,
    stored: Mapping[str, Tensor],
    result: BlockResult,
    means: Mapping[str, Tensor],
    device: torch.device,
) -> dict[str, LayerError]:
    transposed = {entry.layer.parameter for entry in plan.entries if entry.layer.transposed}
    errors = {}
    for name, weight in result.weights.items():
        own = stored[name].t() if name in transposed else stored[name]
        mean = means.get(name)
        errors[name] = weight_error(own, weight, device, None if mean is None else mean.to(device))
    return errors


def _errors_outside(
    session: Session, quantized: QuantizedSource, head_means: Mapping[str, Tensor]
) -> dict[str, LayerError]:
    """Returns errors of weights outside the blocks; output layers are weighted by what reached the head."""
    plan, result = session.plan, quantized.outside()
    means = {name: mean for mean in head_means.values() for name in output_layers(plan)}
    stored: dict[str, Tensor] = {}
    for name, entry in plan.outside().items():
        stored[name] = session.source.tensors(entry.layer.name)[name]
    return _layer_errors(plan, stored, result, means, quantized.device)


@torch.no_grad()
def _predictions(
    plan: Plan, original: BlockStream, quantized: BlockStream, source: QuantizedSource
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns what `compared` gives for every position that a next token is known of, and what reaches the head."""
    head = str(plan.structure.head)
    # Two skeletons are held where the second one differs; a tied head that is quantized alone is given.
    predicting = quantized if plan.outside() else original
    given = None
    if plan.structure.tied_head and f"{head}.weight" in plan.outside():
        given = source.dense(f"{head}.weight", source.outside())
    means = ChannelMeans(original.source.model, [f"{head}.weight"] if plan.outside() else [])
    inputs = original.data.input_ids
    pieces = _pieces(original)
    per_token = torch.zeros(4, len(inputs), inputs.shape[1] - 1)
    assert original.original is not None
    assert quantized.original is not None
    for index, piece in enumerate(pieces):
        if index % distributed.world_size() != distributed.rank():
            continue
        samples = torch.arange(piece.start, piece.stop)
        with means:
            wanted = original.logits(original.original[piece].to(original.device), samples)
        with _quantized_head_input(plan, original, source):
            found = predicting.logits(quantized.original[piece].to(original.device), samples, given)
        per_token[:, piece] = compared(wanted, found, inputs[piece].to(wanted.device)).cpu()
    by_sample = per_token.transpose(0, 1).contiguous()
    return distributed.fill_from_owners(by_sample, pieces).transpose(0, 1), means.values()


def _pieces(stream: BlockStream) -> list[slice]:
    """Returns the samples whose logits are computed at a time."""
    words = stream.source.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    count, tokens = stream.data.input_ids.shape
    size = min(stream.batch_size, max(1, LOGITS_AT_A_TIME // (words * tokens)))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextlib.contextmanager
def _quantized_head_input(plan: Plan, stream: BlockStream, source: QuantizedSource) -> Iterator[None]:
    """Quantizes what the output layer sees for the time of a forward pass, where its scheme says so."""
    head = str(plan.structure.head)
    quantizer = quantizers_of(source.outside()).get(f"{head}.weight")
    if quantizer is None:
        yield
        return

    def quantize(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantizer(args[0]), *args[1:])

    handle = stream.source.model.get_submodule(head).register_forward_pre_hook(quantize)
    try:
        yield
    finally:
        handle.remove()
