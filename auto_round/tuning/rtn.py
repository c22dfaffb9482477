"""Rounding without steps: plain, or with scales searched under the importance of input channels."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.config import TuneConfig
from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import UNTOUCHED
from auto_round.data_types.float_grid import shared_rows
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import BlockResult, QuantizedTensor, join_rows
from auto_round.tuning.base import TuningTask, tuned_together
from auto_round.tuning.search import searched_ranges
from auto_round.tuning.statistics import group_products

ELEMENTS_AT_A_TIME = {"cpu": 1 << 18, "gpu": 1 << 25}


def round_plain(weight_OI: Tensor, scheme: QuantizationScheme, tensor_peak: Tensor | None = None) -> QuantizedTensor:
    """Returns a weight rounded to the nearest code, its scale covering every weight of the group.

    Args:
        tensor_peak: as in `data_types.base.DataType`.
    """
    data_type = DATA_TYPES[scheme.data_type]
    if data_type.has_tensor_scale and tensor_peak is None:
        tensor_peak = weight_OI.abs().amax().float()

    def rounded(rows: slice) -> QuantizedTensor:
        piece = weight_OI[rows].float().contiguous()
        return data_type.encode(piece, scheme, data_type.minmax_range(piece, scheme, tensor_peak), UNTOUCHED)

    return join_rows(((rows, rounded(rows)) for rows in _row_pieces(weight_OI, scheme)), weight_OI.shape[0])


def round_searched(
    weight_OI: Tensor, scheme: QuantizationScheme, importance: Tensor | None, tensor_peak: Tensor | None = None
) -> QuantizedTensor:
    """Returns a weight rounded to the nearest code, its scale searched for the least weighted error."""
    data_type = DATA_TYPES[scheme.data_type]
    range_ = data_type.search_range(weight_OI, scheme, importance, tensor_peak)
    return data_type.encode(weight_OI, scheme, range_, UNTOUCHED)


def _row_pieces(weight_OI: Tensor, scheme: QuantizationScheme) -> list[slice]:
    """Returns the rows that are rounded at a time, so that intermediates stay in a CPU's cache; a scale is never cut.

    More rows at a time than these gain nothing, fewer lose to the cost of each call: of 4-bit weights on a Zen 4 core
    2**16 values at a time take 3.1 ns each, 2**18 and 2**20 take 1.5 ns.
    """
    rows, width = weight_OI.shape
    if scheme.group_size == 0:
        return [slice(0, rows)]
    shared = shared_rows(rows, scheme.group_size)
    on_cpu = weight_OI.device.type == "cpu"
    elements = ELEMENTS_AT_A_TIME["cpu"] * torch.get_num_threads() if on_cpu else ELEMENTS_AT_A_TIME["gpu"]
    step = max(1, elements // (width * shared)) * shared
    return [slice(start, start + step) for start in range(0, rows, step)]


class PlainRounding:
    """Plain round-to-nearest. Needs no calibration."""

    needs_targets = False
    needs_original_inputs = False

    def __call__(self, task: TuningTask, config: TuneConfig) -> BlockResult:  # noqa: ARG002
        """Returns each weight rounded by itself."""
        peaks = task.tensor_peaks()
        return BlockResult(
            {name: round_plain(task.weight(name), scheme, peaks.get(name)) for name, scheme in task.schemes.items()}
        )


class SearchedRounding:
    """Round-to-nearest with searched scales ("optimized RTN"). One forward pass of calibration text."""

    needs_targets = False
    needs_original_inputs = True

    def __call__(self, task: TuningTask, config: TuneConfig) -> BlockResult:  # noqa: ARG002
        """Returns each weight rounded under the importance of its input channels."""
        inputs = task.inputs if task.original_inputs is None else task.original_inputs
        measured = {name: scheme for name, scheme in task.schemes.items() if name not in task.importance}
        importance: dict[str, Tensor] = dict(task.importance)
        if measured:
            importance |= group_products(task.block, inputs, task.batches, measured, mask_NT=task.mask)
        peaks = task.tensor_peaks()
        weights: dict[str, QuantizedTensor] = {}
        for name, parts in tuned_together(task).items():
            scheme, pieces = task.schemes[parts[0]], task.weight(name).chunk(len(parts))
            data_type, known = DATA_TYPES[scheme.data_type], [importance.get(part) for part in parts]
            ranges = searched_ranges(pieces, scheme, known, [peaks.get(part) for part in parts])
            for part, piece, range_ in zip(parts, pieces, ranges, strict=True):
                weights[part] = data_type.encode(piece, scheme, range_, data_type.trainable(piece, scheme))
        weights = {name: weights[name] for name in task.schemes}
        # Experts are told by `tune`, one by one and not weight by weight.
        experts = tuple(f"{name}." for name in task.block.experts())
        idle = sorted(name for name in set(task.schemes) - set(importance) if not name.startswith(experts))
        note = f"calibration never reached {', '.join(idle)}; unweighted search there" if idle else ""
        return BlockResult(weights, note=note)
