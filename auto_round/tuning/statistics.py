"""What calibration tells about the weights of a block: how strongly each input channel and each output is used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.block import Block
from auto_round.channels import ChannelSums
from auto_round.models.experts import LinearExperts, every_expert_sees_all_tokens
from auto_round.schemes import QuantizationScheme

LARGEST_PRODUCTS = 256  # channels of a group; larger groups would take more memory than their weights


@torch.no_grad()
def input_peaks(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    weights: Sequence[str],
    *,
    mask_NT: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the largest magnitude of each layer's input, () float32, by weight name; padding does not count.

    A layer that calibration never reached is missing.
    """
    peaks: dict[str, Tensor] = {}

    def keep(name: str, rows_RI: Tensor) -> None:
        peak = rows_RI.abs().amax().float()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    _see_inputs(block, inputs_NTH, batches, weights, mask_NT, keep)
    return peaks


@torch.no_grad()
def expert_tokens(block: Block, inputs_NTH: Tensor, batches: Sequence[slice]) -> dict[str, list[int]]:
    """Returns name of a list of experts -> how many calibration tokens were routed to each, padding included."""
    counts: dict[str, Tensor] = {}

    def count(name: str, experts: LinearExperts, args: tuple[Any, ...]) -> None:
        counts[name] = counts.get(name, 0) + experts.token_counts(*args)

    handles = []
    try:
        for name, experts in block.experts().items():
            handles.append(experts.register_forward_pre_hook(functools.partial(count, name)))
        for piece in batches if handles else ():
            block.forward(inputs_NTH[piece].to(block.device), torch.arange(piece.start, piece.stop))
    finally:
        for handle in handles:
            handle.remove()
    return {name: tokens.tolist() for name, tokens in counts.items()}


@torch.no_grad()
def channel_importance(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    weights: Sequence[str],
    *,
    mask_NT: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the mean square of each input channel, (I,) float32, by weight name.

    This is the diagonal of the Hessian of the layer's output error, the "imatrix" of llama.cpp.

    Args:
        mask_NT: bool, False for padding, which then does not count. A layer that sees a choice of the tokens (a routed
            expert) counts them all: which of them are padding is not known there.
    """
    sums = channel_sums(block, inputs_NTH, batches, weights, mask_NT=mask_NT)
    return {name: one.squares / one.tokens for name, one in sums.items()}


@torch.no_grad()
def channel_sums(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    weights: Sequence[str],
    *,
    mask_NT: Tensor | None = None,
) -> dict[str, ChannelSums]:
    """Returns the sums of squares behind `channel_importance`, and over how many tokens they go."""
    moments = {name: _sum_of_squares for name in weights}
    sums, counts = _sums_of_moments(block, inputs_NTH, batches, moments, mask_NT)
    return {name: ChannelSums(total, counts[name]) for name, total in sums.items()}


@torch.no_grad()
def group_products(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    schemes: Mapping[str, QuantizationScheme],
    *,
    mask_NT: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns (G, K, K) float32 mean products of the input channels of each group, by weight name.

    These are the blocks on the diagonal of the Hessian of the layer's output error. Where groups are larger than
    LARGEST_PRODUCTS or do not divide the row, the mean squares (I,) of `channel_importance` take their place.
    """
    moments: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, scheme in schemes.items():
        size = scheme.group_size if isinstance(scheme.group_size, int) else 0
        moments[name] = _sum_of_squares
        if 0 < size <= LARGEST_PRODUCTS:
            moments[name] = functools.partial(_sum_of_products, size=size)
    sums, counts = _sums_of_moments(block, inputs_NTH, batches, moments, mask_NT)
    return {name: total / counts[name] for name, total in sums.items()}


def _sum_of_squares(rows_RI: Tensor) -> Tensor:
    return rows_RI.square().sum(0)


def _sum_of_products(rows_RI: Tensor, size: int) -> Tensor:
    if rows_RI.shape[1] % size:
        return _sum_of_squares(rows_RI)
    groups_GRK = rows_RI.unflatten(1, (-1, size)).transpose(0, 1)
    return groups_GRK.transpose(1, 2) @ groups_GRK


def _sums_of_moments(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    moments: Mapping[str, Callable[[Tensor], Tensor]],
    mask_NT: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns sums over tokens of what `moments` makes of a layer's input rows, and the tokens."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name: str, rows_RI: Tensor) -> None:
        total = moments[name](rows_RI.float())
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + rows_RI.shape[0]

    _see_inputs(block, inputs_NTH, batches, list(moments), mask_NT, keep)
    return sums, counts


def _see_inputs(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    weights: Sequence[str],
    mask_NT: Tensor | None,
    keep: Callable[[str, Tensor], None],
) -> None:
    """Runs a block over all batches and calls `keep(weight name, (R, I) input rows)` for every linear layer that runs.

    Padding is left out where a layer sees all tokens in order; one that sees a choice of them keeps all.
    """
    real: Tensor | None = None  # the mask of the running batch

    def hook(name: str, module_input: Tensor, _output: Tensor) -> None:
        seen = module_input.detach()
        keep(name, seen[real] if real is not None and seen.shape[:-1] == real.shape else seen.flatten(0, -2))

    routing = every_expert_sees_all_tokens() if block.shows_all_experts else contextlib.nullcontext()
    with _watched(block, weights, hook), routing:
        for piece in batches:
            real = None if mask_NT is None else mask_NT[piece].to(block.device)
            block.forward(inputs_NTH[piece].to(block.device), torch.arange(piece.start, piece.stop))


def output_sensitivity(
    block: Block,
    inputs_NTH: Tensor,
    batches: Sequence[slice],
    weights: Sequence[str],
    generator: torch.Generator,
    *,
    mask_NT: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns E[(J^T v)^2] for each output of each layer, (O,) float32, by weight name.

    J is the derivative of the block's output by the layer's output, v a normal probe: Hutchinson's estimate of the
    diagonal of J^T J, the Gauss-Newton curvature of the block's squared error. Source: docs/algorithms.md.

    Args:
        mask_NT: bool, False for padding, whose outputs do not count in the block's error.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _input: Tensor, output: Tensor) -> None:
        # Keys of cross-attention come from pictures, so nothing before them asks for a gradient.
        outputs[name] = output if output.requires_grad else output.requires_grad_()

    for piece in batches:
        outputs.clear()
        hidden = inputs_NTH[piece].to(block.device).detach().requires_grad_()
        with _watched(block, weights, keep):
            result = block.forward(hidden, torch.arange(piece.start, piece.stop))
        probe = torch.randn(result.shape, generator=generator).to(result)
        padding = 0
        if mask_NT is not None:
            probe = probe * mask_NT[piece].to(block.device)[..., None]
            padding = int((~mask_NT[piece]).sum())
        names = list(outputs)
        gradients = torch.autograd.grad((result * probe).sum(), [outputs[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                continue
            rows = gradient.flatten(0, -2).float()
            sums[name] = sums[name] + rows.square().sum(0) if name in sums else rows.square().sum(0)
            sees_all = outputs[name].shape[:-1] == result.shape[:-1]
            counts[name] = counts.get(name, 0) + rows.shape[0] - (padding if sees_all else 0)
    return {name: total / counts[name] for name, total in sums.items()}


@contextlib.contextmanager
def _watched(block: Block, weights: Sequence[str], keep: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `keep(weight name, input, output)` for every linear layer that runs; hooks are gone afterwards."""
    handles = []
    try:
        for weight, module in block.layers(weights).items():

            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = weight) -> None:
                keep(name, args[0], output)

            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
