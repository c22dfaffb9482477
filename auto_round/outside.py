"""Rounds weights outside the blocks: the output layer, and vision tower and projector of a vision-language model.

They are not tuned by steps. For the output layer that would take more memory than the model: its outputs, one per token
and word. Scales are searched under what calibration samples give each layer, where they reach it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from torch import Tensor

from auto_round import distributed
from auto_round.channels import sums_of
from auto_round.checkpoint import WeightSource
from auto_round.config import RunConfig
from auto_round.data_types.activations import stored_peak
from auto_round.device import compute_device
from auto_round.formats.export import HEAD_BLOCK
from auto_round.plan import Plan
from auto_round.store import RunStore
from auto_round.tensors import BlockResult, QuantizedTensor
from auto_round.tuning import round_plain, round_searched

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class OutsideInputs:
    """What calibration tells about the inputs of layers outside the blocks.

    Attributes:
        head: (R, H) what the output layer sees at real tokens; None if it is not quantized.
        means: weight name -> (I,) mean square of each input channel, of the other layers that ran.
    """

    head: Tensor | None
    means: Mapping[str, Tensor]


def output_layers(plan: Plan) -> list[str]:
    """Returns the weights outside the blocks that give the logits: the output layer, or the embedding tied to it.

    What a format says of an embedding that serves as output layer too is said for that: there errors count.
    """
    linear = {layer.parameter for layer in plan.structure.linears}
    is_tied = plan.structure.tied_head
    return [
        n for n, e in plan.outside().items() if e.layer.name == plan.structure.head or (is_tied and n not in linear)
    ]


def round_outside(
    plan: Plan, source: WeightSource, store: RunStore, config: RunConfig, inputs: OutsideInputs | None = None
) -> None:
    """Stores all quantized weights outside the blocks, if there are any and they are not stored yet.

    Args:
        inputs: None for plain rounding.
    """
    outside = plan.outside()
    if not outside or store.has(HEAD_BLOCK) or not distributed.is_writer():
        return
    importance = {} if inputs is None else dict(inputs.means)
    if inputs is not None and inputs.head is not None:
        seen = sums_of(inputs.head)
        measured = {name: seen.squares / seen.tokens for name in output_layers(plan)}
        importance = measured | importance  # what was given counts
    weights: dict[str, QuantizedTensor] = {}
    for name, entry in outside.items():
        weight = source.tensors(entry.layer.name)[name].to(compute_device(config.device)).float()
        weight = weight.t() if entry.layer.transposed else weight
        if inputs is None or not config.tune.needs_calibration:
            quantized = round_plain(weight, entry.scheme)
        else:
            seen = importance.get(name)
            quantized = round_searched(weight, entry.scheme, None if seen is None else seen.to(weight.device))
        activation = entry.scheme.activation
        if activation is not None and activation.needs_calibration:
            # Only the output layer can have such a scheme, and it is calibrated then.
            assert inputs is not None
            assert inputs.head is not None
            peak = inputs.head.abs().amax().float()
            quantized = dataclasses.replace(quantized, input_peak=stored_peak(peak, entry.scheme))
        weights[name] = quantized.to("cpu")
    idle = [name for name in outside if name not in importance]
    note = f"calibration never reached {len(idle)} of {len(outside)} layers, e.g. {idle[0]}" if inputs and idle else ""
    logger.info("rounded %d layers outside the blocks%s", len(weights), f"; {note}" if note else "")
    store.save(HEAD_BLOCK, BlockResult(weights, note=note))
