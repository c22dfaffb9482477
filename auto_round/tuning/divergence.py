"""The quantized model beside the 16-bit one: divergence of their token distributions, and its gradient by the scales.

Blocks run one after the other, as when they are tuned. A gradient comes from two passes: forward without a graph, each
block's input kept, then backward, each block run again from its input with its dequantized weights as leaves. Memory,
for P quantized weights, L blocks, N samples of T tokens, hidden size H, B samples at a time: P bytes of codes (half of
the 16-bit model), four float32 numbers for each scale, 2 N T H values (what the first block sees, and the last one's
original outputs, from which the 16-bit model's logits are computed again), L B T H values of block inputs, one block's
dequantized weights and gradients, and the logits of a few samples. All but scales, one block and one batch's values
lie on the storage device of the stream.

Shape letters: N samples, T tokens, H hidden, V words, O and I outputs and inputs of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from auto_round import distributed
from auto_round.block import Block
from auto_round.blocks import BlockStream
from auto_round.plan import FUSED_GROUPS
from auto_round.tensors import BlockResult, QuantizedTensor
from auto_round.tuning.activations import quantizers_of, with_input_quantizers
from auto_round.tuning.scale_factors import SCALE_FACTORS, why_not_tunable

LOGITS_AT_A_TIME = 1 << 27  # numbers; about five float32 tensors of them are alive, a sample is not cut

Sigmas = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantizedBlock:
    """One group of blocks with its codes.

    Attributes:
        block: holds what is not quantized; inputs of layers pass through quantizers where activations are quantized.
        weights: parameter name -> codes and scales, on the storage device.
        transposed: names of weights that are stored (in, out).
    """

    block: Block
    weights: Mapping[str, QuantizedTensor]
    transposed: frozenset[str]

    def dense(self, sigmas: Sigmas, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Returns what the block runs with: its weights dequantized, scales times exp(sigma), by name."""
        found = {}
        for name, weight in self.weights.items():
            dense_OI = rescaled(weight.to(self.block.device), sigmas.get(keys.get(name, ""))).dequantize()
            found[name] = (dense_OI.t() if name in self.transposed else dense_OI).to(self.block.dtype)
        return found


def rescaled(weight: QuantizedTensor, sigma: Tensor | None) -> QuantizedTensor:
    """Returns a weight with the scales that sigma stands for; itself where none is tuned."""
    return weight if sigma is None else SCALE_FACTORS[weight.scheme.data_type].rescaled(weight, sigma)


class QuantizedModel:
    """The quantized model, streamed, and the 16-bit model's last hidden states.

    Args:
        stream: of the calibration samples; the 16-bit model runs over all of them once, here.
        load: gives the result of a group by the name of its first block.
        head: name and codes of the output layer where it is quantized.
        transposed: names of weights that are stored (in, out).
        fixed: names of weights whose scales are not tuned.
    """

    def __init__(
        self,
        stream: BlockStream,
        load: Callable[[str], BlockResult],
        head: tuple[str, QuantizedTensor] | None,
        transposed: frozenset[str],
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self.stream, self.mask = stream, stream.data.attention_mask
        assert stream.original is not None
        self.inputs = hidden = stream.original
        self.blocks: list[QuantizedBlock] = []
        for index, names in enumerate(stream.groups):
            block, result = stream.load(index), load(names[0])
            hidden = stream.run(block, hidden)
            lean = block.without({*result.weights, *result.plain})
            plain = {name: tensor.to(stream.device) for name, tensor in result.plain.items()}
            lean = dataclasses.replace(lean, tensors={**lean.tensors, **plain})
            lean = with_input_quantizers(lean, quantizers_of(result))
            weights = {name: weight.to(stream.storage) for name, weight in result.weights.items()}
            self.blocks.append(QuantizedBlock(lean, weights, transposed))
        self.targets = hidden
        self.head_name, self.head = (None, None) if head is None else (head[0], head[1].to(stream.device))
        self.keys = sigma_keys({name: weight for name, weight in self.weights().items() if name not in fixed})

    def weights(self) -> dict[str, QuantizedTensor]:
        """Returns all quantized weights that run, by name."""
        found = {name: weight for part in self.blocks for name, weight in part.weights.items() if part.block.runs}
        return found if self.head_name is None or self.head is None else {**found, self.head_name: self.head}

    def start(self) -> dict[str, Tensor]:
        """Returns sigma of the model as it is, on the compute device, by the values of `keys`."""
        weights = self.weights()
        rules = {key: SCALE_FACTORS[weights[key].scheme.data_type] for key in self.keys.values()}
        return {key: rule.start(weights[key]).to(self.stream.device) for key, rule in rules.items()}

    @torch.no_grad()
    def divergence(self, samples: Tensor, sigmas: Sigmas) -> float:
        """Returns the mean divergence over the real tokens of some samples, KL(16-bit || quantized) in nats."""
        total = torch.zeros((), device=self.stream.device)
        for batch in self._own(samples):
            hidden = self._forward(batch, sigmas, [])
            total += sum(kl for _, kl in self._at_head(hidden, batch, self._dense_head(sigmas)))
        return float(distributed.sum_over_ranks(total)) / self._token_count(samples)

    def gradients(self, samples: Tensor, sigmas: Sigmas) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean divergence of some samples, () float32, and its gradient by each sigma; ranks share work."""
        total = torch.zeros((), device=self.stream.device)
        found = {key: torch.zeros_like(sigma) for key, sigma in sigmas.items()}
        for batch in self._own(samples):
            total += self._accumulate(batch, sigmas, found)
        count = self._token_count(samples)
        for gradient in found.values():
            distributed.sum_over_ranks(gradient).div_(count)
        return distributed.sum_over_ranks(total) / count, found

    def _own(self, samples: Tensor) -> list[Tensor]:
        """Returns the batches of samples that this rank works on."""
        shares = samples.chunk(distributed.world_size())
        mine = shares[distributed.rank()] if distributed.rank() < len(shares) else samples[:0]
        return [batch for batch in mine.split(self.stream.batch_size) if batch.numel()]

    def _token_count(self, samples: Tensor) -> int:
        return samples.numel() * self.inputs.shape[1] if self.mask is None else int(self.mask[samples].sum())

    @torch.no_grad()
    def _forward(self, samples: Tensor, sigmas: Sigmas, inputs: list[Tensor]) -> Tensor:
        """Returns the last block's output; keeps what each block sees in `inputs`, on the storage device."""
        hidden = self.inputs[samples.to(self.inputs.device)].to(self.stream.device)
        for part in self.blocks:
            inputs.append(hidden.to(self.stream.storage))
            if part.block.runs:
                hidden = part.block.forward(hidden, samples, part.dense(sigmas, self.keys))
        return hidden

    def _accumulate(self, samples: Tensor, sigmas: Sigmas, found: dict[str, Tensor]) -> Tensor:
        """Returns the summed divergence of one batch and adds its gradient by each sigma to `found`."""
        inputs: list[Tensor] = []
        hidden = self._forward(samples, sigmas, inputs)
        head = self._dense_head(sigmas)
        total, gradients, by_head = torch.zeros((), device=hidden.device), [], []
        for piece, kl in self._at_head(hidden, samples, None if head is None else head.requires_grad_()):
            by_piece, *rest = torch.autograd.grad(kl, [piece] if head is None else [piece, head])
            total += kl.detach()
            gradients.append(by_piece)
            by_head += rest
        if head is not None and self.head is not None and self.head_name is not None:
            name = self.head_name
            self._add(found, {name: self.head}, {name: head}, {name: torch.stack(by_head).sum(0)})
        gradient = torch.cat(gradients)
        for part in reversed(self.blocks):
            seen = inputs.pop()
            if part.block.runs:
                gradient = self._backward(part, seen, samples, sigmas, gradient, found)
        return total

    def _backward(
        self,
        part: QuantizedBlock,
        seen: Tensor,
        samples: Tensor,
        sigmas: Sigmas,
        gradient: Tensor,
        found: dict[str, Tensor],
    ) -> Tensor:
        """Returns the gradient by a block's input from that by its output; adds those by sigmas to `found`."""
        dense = {name: weight.requires_grad_() for name, weight in part.dense(sigmas, self.keys).items()}
        hidden = seen.to(self.stream.device).detach().requires_grad_()
        output = part.block.forward(hidden, samples, dense)
        leaves = [hidden, *dense.values()]
        by_input, *by_weights = torch.autograd.grad(output, leaves, gradient, allow_unused=True)
        # An expert that no token of the batch went to has no gradient.
        known = {name: by for name, by in zip(dense, by_weights, strict=True) if by is not None}
        upright = {name: (by.t() if name in part.transposed else by) for name, by in known.items()}
        values = {name: (dense[name].t() if name in part.transposed else dense[name]) for name in known}
        self._add(found, part.weights, values, upright)
        return by_input

    @torch.no_grad()
    def _add(
        self,
        found: dict[str, Tensor],
        weights: Mapping[str, QuantizedTensor],
        dense_OI: Mapping[str, Tensor],
        by_dense_OI: Mapping[str, Tensor],
    ) -> None:
        for name, by in by_dense_OI.items():
            if name in self.keys:
                factors = SCALE_FACTORS[weights[name].scheme.data_type]
                found[self.keys[name]] += factors.gradient(by.float(), dense_OI[name].float(), weights[name])

    def _dense_head(self, sigmas: Sigmas) -> Tensor | None:
        if self.head is None or self.head_name is None:
            return None
        return rescaled(self.head, sigmas.get(self.keys.get(self.head_name, ""))).dequantize(self.stream.dtype)

    def _at_head(self, hidden: Tensor, samples: Tensor, head: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields pieces of the last block's output, as leaves, and the summed divergence of each."""
        words = self.stream.source.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        size = max(1, LOGITS_AT_A_TIME // (words * hidden.shape[1])) if self.stream.data.media is None else 1
        for rows in torch.arange(len(samples)).split(size):
            chosen, piece = samples[rows], hidden[rows.to(hidden.device)].detach()
            predicted = self.stream.logits(piece.requires_grad_(torch.is_grad_enabled()), chosen, head)
            with torch.no_grad():
                original = self.targets[chosen.to(self.targets.device)].to(self.stream.device)
                wanted = self.stream.logits(original, chosen)
            yield piece, summed_divergence(predicted, wanted, None if self.mask is None else self.mask[chosen])


def summed_divergence(predicted_NTV: Tensor, wanted_NTV: Tensor, mask_NT: Tensor | None) -> Tensor:
    """Returns the sum over real tokens of KL(softmax(wanted) || softmax(predicted)), computed in float32, in nats."""
    predicted, wanted = predicted_NTV.float().log_softmax(-1), wanted_NTV.float().log_softmax(-1)
    kl_NT = torch.nn.functional.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
    return kl_NT.sum() if mask_NT is None else (kl_NT * mask_NT.to(kl_NT.device)).sum()


def sigma_keys(weights: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """Returns weight name -> name that its sigma goes by: its own, or that of the first of those it is joined with.

    Weights whose scales cannot be tuned are missing.
    """
    keys = {name: name for name, weight in weights.items() if why_not_tunable(weight.scheme) is None}
    for name in keys:
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if not SCALE_FACTORS[weights[name].scheme.data_type].shared_by_joined:
            continue
        for members in FUSED_GROUPS:
            joined = [f"{stem}.{member}.weight" for member in members if f"{stem}.{member}.weight" in keys]
            same = [other for other in joined if weights[other].scheme == weights[name].scheme]
            if leaf in members and same:
                keys[name] = same[0]
    return keys
