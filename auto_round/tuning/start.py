"""Where the tuning of a block starts: searched ranges, offsets of zero, clip factors of one.

The same projection of all experts of a layer is one weight here, the rows of each expert together: a step then costs
as many kernels as it does for three layers, whatever the number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import Range
from auto_round.schemes import QuantizationScheme
from auto_round.tuning.base import TuningTask, tuned_together
from auto_round.tuning.search import searched_ranges
from auto_round.tuning.statistics import channel_importance, output_sensitivity
from auto_round.tuning.tuned_weight import Curvature, TunedWeight

WIDE_REACH_BITS = 3  # up to this width an offset may travel a whole step of the grid, above it half of one
PROBE_BATCHES = 2


def starting_weights(task: TuningTask, config: TuneConfig) -> dict[str, TunedWeight]:
    """Returns what is tuned, by the name of a weight, or of a stack of the block in place of its parts."""
    names = list(task.schemes)
    importance = channel_importance(task.block, task.inputs, task.batches, names, mask_NT=task.mask)
    sensitivity: Mapping[str, Tensor] = {}
    if config.uses_curvature:
        probes = [piece for piece in task.batches if piece.start < PROBE_BATCHES * config.batch_size]
        sensitivity = output_sensitivity(task.block, task.inputs, probes, names, task.generator(), mask_NT=task.mask)
    weights, peaks, seen = {}, task.tensor_peaks(), {**importance, **task.importance}
    for name, parts in tuned_together(task).items():
        scheme, weight = task.schemes[parts[0]], task.weight(name)
        data_type, pieces = DATA_TYPES[scheme.data_type], weight.chunk(len(parts))
        ranges = searched_ranges(pieces, scheme, [seen.get(p) for p in parts], [peaks.get(p) for p in parts])
        weights[name] = TunedWeight(
            weight=weight,
            scheme=scheme,
            data_type=data_type,
            range_=_joined(ranges),
            params=data_type.trainable(weight, scheme),
            curvature=_curvature(parts, sensitivity, importance, task),
            reach=reach(scheme, config),
            parts=len(parts),
        )
    return weights


def reach(scheme: QuantizationScheme, config: TuneConfig) -> float:
    """Returns how far a rounding offset may travel, in steps of the grid."""
    return 1.0 if config.uses_curvature and scheme.bits <= WIDE_REACH_BITS else 0.5


def _joined(ranges: Sequence[Range]) -> Range:
    """Returns the range of some weights whose rows follow each other."""
    return ranges[0] if len(ranges) == 1 else {name: torch.cat([found[name] for found in ranges]) for name in ranges[0]}


def _curvature(
    parts: Sequence[str], sensitivity: Mapping[str, Tensor], importance: Mapping[str, Tensor], task: TuningTask
) -> Curvature | None:
    """Returns the curvature of a weight, or of some whose rows follow each other; None where it is not known.

    Loss = mean over tokens and D outputs, so its Gauss-Newton diagonal is 2/D E[x_j^2] c_i. Where some parts are not
    known, no step of theirs has a gradient either: they get zeros.
    """
    known = [part for part in parts if part in sensitivity and part in importance]
    if not known:
        return None
    share = 2.0 / task.inputs.shape[-1]
    if len(parts) == 1:
        return Curvature(sensitivity[known[0]] * share, importance[known[0]])
    outputs, inputs = torch.zeros_like(sensitivity[known[0]]), torch.zeros_like(importance[known[0]])
    is_known = set(known)
    return Curvature(
        torch.cat([sensitivity[part] * share if part in is_known else outputs for part in parts]),
        torch.stack([importance[part] if part in is_known else inputs for part in parts]),
    )
