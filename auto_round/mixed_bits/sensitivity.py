"""What it costs the model's predictions that one group of layers is quantized, to second order.

For a small error e of a group of layers, the divergence KL(16-bit || quantized) of the tokens of a sample is
1/2 e' F e, with the Fisher matrix F = sum over tokens t of J_t' (diag(p_t) - p_t p_t') J_t; J_t is the derivative of
the logits. Let z be normal and v_t = sqrt(p_t) * z - p_t (sqrt(p_t) . z). Then v_t has the covariance
diag(p_t) - p_t p_t', so that the gradient g of sum_t v_t . logits_t has E[(g . e)^2] = e' F e. One backward pass gives
such a g for all layers at once. What an error does at all positions of a sample is summed before it is squared, so
that errors that add up are seen to do so. Errors are those of weights after their scales were searched, and of
quantized activations at the layer's input.

Blocks are read twice, forwards and backwards. For L blocks, N samples of T tokens, hidden size H and K probes there
are L N T H block inputs and K N T H gradients on the storage device; on the compute device one block, its gradient and
its errors under each option.

Source: docs/algorithms.md, section 3.8, with the sum over positions inside the square.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.block import Block, InputQuantizer
from auto_round.blocks import BlockStream
from auto_round.config import TuneConfig
from auto_round.errors import CalibrationError, UnsupportedError
from auto_round.memory import release_freed
from auto_round.schemes import QuantizationScheme
from auto_round.tuning import TuningTask, quantizers_of, tune

logger = logging.getLogger(__name__)

# lm-6m, 24 groups, 32 samples of 256 tokens: 32 x 8 squares have a standard error of about 9 % of a sensitivity.
PROBES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One group of layers, by its weights.

    Attributes:
        weights: parameter names, all in one group of blocks of the stream.
        schemes: of each weight under each option; None where the option is none.
    """

    weights: tuple[str, ...]
    schemes: tuple[tuple[QuantizationScheme, ...] | None, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Errors:
    """What the options do to a block.

    Attributes:
        weights: name -> (M, numbers) quantized minus original weight under each of M options, flat, as the model
            stores it; zero where an option is none.
        quantizers: of each option, weight name -> what the layer's input passes through; empty for 16-bit activations.
    """

    weights: Mapping[str, Tensor]
    quantizers: tuple[Mapping[str, InputQuantizer], ...]

    def products(self, by_weight: Mapping[str, Tensor | None]) -> Tensor:
        """Returns (weights, M) float32 products of each weight's gradient and errors; 0 without a gradient."""
        found = []
        for name, gradient in by_weight.items():
            errors = self.weights[name]
            # An expert that no token of the sample went to has no gradient.
            found.append(errors.new_zeros(len(errors)) if gradient is None else errors @ gradient.flatten())
        return torch.stack(found).float()


def sensitivities(
    stream: BlockStream,
    parts: Sequence[Part],
    transposed: frozenset[str],
    generator: torch.Generator,
    *,
    probes: int = PROBES,
) -> list[list[float]]:
    """Returns for each part and option the expected divergence, in nats per token; infinity for what is no option.

    Args:
        transposed: names of weights that are stored (in, out).
        generator: on the CPU.
    Raises:
        UnsupportedError: a model whose hidden states change between blocks.
        CalibrationError: gradients that are not finite.
    """
    if stream.changes_between_blocks:
        raise UnsupportedError(
            f"{type(stream.source.model).__name__} changes hidden states between its blocks, so that sensitivities "
            "cannot be measured backwards. Choose bits with --layer_config, or a recipe"
        )
    assert stream.original is not None
    inputs, hidden = [], stream.original
    for index in range(len(stream.groups)):
        inputs.append(hidden)
        hidden = stream.run(stream.load(index), hidden)
        release_freed()
    own = range(distributed.rank(), len(hidden), distributed.world_size())
    gradients = _at_head(stream, hidden, own, probes, generator)
    del hidden
    options = len(parts[0].schemes)
    sums = torch.zeros(len(parts), options, dtype=torch.float64)
    for index in reversed(range(len(stream.groups))):
        block = stream.load(index)
        dots = tuple(f"{name}." for name in block.names)
        here = [number for number, part in enumerate(parts) if part.weights[0].startswith(dots)]
        seen = inputs.pop()
        if block.runs:
            own_parts = [parts[number] for number in here]
            sums[here] += _of_block(stream, block, seen, own_parts, transposed, gradients)
        logger.info("sensitivities: %s", block.name)
        release_freed()
    totals = distributed.sum_over_ranks(sums)
    if not torch.isfinite(totals).all():
        raise CalibrationError("sensitivities are not finite: the model overflows. Run with --disable_amp")
    mask = stream.data.attention_mask
    tokens = stream.data.input_ids.numel() if mask is None else int(mask.sum())
    losses = (totals / (2 * probes * tokens)).tolist()
    allowed = [[schemes is not None for schemes in part.schemes] for part in parts]
    return [
        [loss if is_option else math.inf for loss, is_option in zip(row, can, strict=True)]
        for row, can in zip(losses, allowed, strict=True)
    ]


def _at_head(
    stream: BlockStream, hidden_NTH: Tensor, own: Sequence[int], probes: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Returns sample -> (K, 1, T, H) gradients of its probes by the last block's output, on the storage device.

    Every sample has random numbers of its own, whatever rank works on it.
    """
    mask = stream.data.attention_mask
    seeds = torch.randint(2**62, (len(hidden_NTH),), generator=generator).tolist()
    found = {}
    for sample in own:
        rows = torch.tensor([sample])
        seen = hidden_NTH[sample : sample + 1].to(stream.device).detach().requires_grad_()
        logits = stream.logits(seen, rows).float()
        random = torch.Generator().manual_seed(seeds[sample])
        pieces = []
        for probe in _probes(logits.detach(), probes, random):
            weighted = probe if mask is None else probe * mask[rows].to(probe)[..., None]
            last = len(pieces) == probes - 1
            (gradient,) = torch.autograd.grad(logits, seen, weighted, retain_graph=not last)
            pieces.append(gradient.to(stream.storage))
        found[sample] = torch.stack(pieces)
    return found


def _probes(logits_NTV: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields random (N, T, V) float32 with covariance diag(p) - p p' at each token, p = softmax(logits)."""
    p = logits_NTV.softmax(-1)
    root = p.sqrt()
    for _ in range(count):
        z = torch.randn(p.shape, generator=generator).to(p.device)
        yield root * z - p * (root * z).sum(-1, keepdim=True)


def _of_block(
    stream: BlockStream,
    block: Block,
    inputs_NTH: Tensor,
    parts: Sequence[Part],
    transposed: frozenset[str],
    gradients: dict[int, Tensor],
) -> Tensor:
    """Returns (parts, options) sums of squares over samples and probes; `gradients` become those by the block's input.

    Changes `gradients` in place.
    """
    names = [name for part in parts for name in part.weights]
    options = range(len(parts[0].schemes)) if parts else range(0)
    errors = _errors(stream, block, inputs_NTH, parts, options, transposed)
    membership = torch.zeros(len(parts), len(names), device=stream.device)
    for number, part in enumerate(parts):
        membership[number, [names.index(name) for name in part.weights]] = 1
    sums = torch.zeros(len(parts), len(options), dtype=torch.float64)
    for sample, by_output in gradients.items():
        hidden = inputs_NTH[sample : sample + 1].to(stream.device).detach().requires_grad_()
        leaves = {name: block.tensors[name].to(block.dtype).detach().requires_grad_() for name in names}
        watch = _InputErrors(errors.quantizers)
        probed = dataclasses.replace(block, input_quantizers=watch.hooks())
        output = probed.forward(hidden, torch.tensor([sample]), leaves)
        wanted = [hidden, *leaves.values(), *watch.leaves()]
        squares = torch.zeros(len(parts), len(options), device=stream.device)
        new = []
        for number, gradient in enumerate(by_output):
            last = number == len(by_output) - 1
            by_input, *rest = torch.autograd.grad(
                output, wanted, gradient.to(stream.device), retain_graph=not last, allow_unused=True
            )
            new.append(by_input.to(stream.storage))
            by_weight, by_leaf = dict(zip(names, rest, strict=False)), rest[len(names) :]
            products = errors.products(by_weight) + watch.products(names, by_leaf, squares)
            squares += (membership @ products).square()
        gradients[sample] = torch.stack(new)
        sums += squares.double().cpu()
    return sums


def _errors(
    stream: BlockStream,
    block: Block,
    inputs_NTH: Tensor,
    parts: Sequence[Part],
    options: range,
    transposed: frozenset[str],
) -> Errors:
    """Returns what the options do to a block's weights and inputs, by searched scales."""
    weights = {
        name: torch.zeros(len(options), block.tensors[name].numel(), dtype=block.dtype, device=stream.device)
        for part in parts
        for name in part.weights
    }
    quantizers: list[Mapping[str, InputQuantizer]] = []
    for option in options:
        schemes: dict[str, QuantizationScheme] = {}
        for part in parts:
            schemes |= dict(zip(part.weights, part.schemes[option] or (), strict=False))
        task = TuningTask(
            block=block, schemes=schemes, transposed=transposed & set(schemes), inputs=inputs_NTH,
            original_inputs=inputs_NTH, targets=None, mask=stream.data.attention_mask, batches=stream.batches(), seed=0,
        )  # fmt: skip
        result = tune(task, TuneConfig(iters=0))
        for name, weight in result.weights.items():
            dense_OI = weight.dequantize()
            stored = dense_OI.t() if name in transposed else dense_OI
            weights[name][option] = (stored - block.tensors[name].float()).flatten()
        quantizers.append(quantizers_of(result))
    return Errors(weights, tuple(quantizers))


class _InputErrors:
    """Adds a zero to the input of each layer whose activations are quantized; its gradient tells what errors there do.

    A layer may run several times in one pass, or, as an expert, on a choice of tokens.

    Args:
        quantizers: of each option, by weight name.
    """

    def __init__(self, quantizers: Sequence[Mapping[str, InputQuantizer]]) -> None:
        self.quantizers = quantizers
        self.seen: list[tuple[str, dict[int, Tensor], Tensor]] = []

    def hooks(self) -> dict[str, InputQuantizer]:
        """Returns weight name -> what its layer's input passes through."""

        def hook(name: str) -> InputQuantizer:
            return lambda values: self._seen(name, values)

        return {name: hook(name) for own in self.quantizers for name in own}

    def leaves(self) -> list[Tensor]:
        """Returns the zeros of one pass."""
        return [zero for _, _, zero in self.seen]

    def products(self, names: Sequence[str], by_leaf: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Returns (weights, options) float32 products of the gradients by inputs and what options change there."""
        found = like.new_zeros(len(names), len(self.quantizers))
        places = {name: row for row, name in enumerate(names)}
        for (name, changes, _), gradient in zip(self.seen, by_leaf, strict=True):
            for option, change in changes.items() if gradient is not None else ():
                found[places[name], option] += (change.float() * gradient.float()).sum()  # type: ignore[union-attr]
        return found

    def _seen(self, name: str, values: Tensor) -> Tensor:
        zero, plain = torch.zeros_like(values, requires_grad=True), values.detach()
        changes = {o: own[name](plain) - plain for o, own in enumerate(self.quantizers) if name in own}
        self.seen.append((name, changes, zero))
        return values + zero
