"""Ranges of several weights of one shape searched in one go: experts are many and small, and a search is many kernels.

A search looks at each group by itself, under the importance of its channels. So the rows of several weights may stand
side by side, as if they were one weight with as many more groups.

Shape letters: P weights, O out features, I in features, G groups of a row, K group size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.base import CHUNK_ELEMENTS, Range
from auto_round.schemes import QuantizationScheme

# Data types whose searched range of a group depends on nothing but its weights and the importance of its channels.
BY_GROUP = ("int", "mx_fp", "mx_int")


def searched_ranges(
    weights_OI: Sequence[Tensor],
    scheme: QuantizationScheme,
    importance: Sequence[Tensor | None],
    tensor_peaks: Sequence[Tensor | None],
) -> list[Range]:
    """Returns what `DataType.search_range` finds for each of some weights of one shape."""
    data_type, found = DATA_TYPES[scheme.data_type], dict[int, Range]()
    size = _weights_at_a_time(weights_OI[0], scheme)
    known = [index for index, squares in enumerate(importance) if squares is not None]
    unknown = [index for index, squares in enumerate(importance) if squares is None]
    for some in (alike[start : start + size] for alike in (known, unknown) for start in range(0, len(alike), size)):
        if len(some) == 1:
            (only,) = some
            found[only] = data_type.search_range(weights_OI[only], scheme, importance[only], tensor_peaks[only])
        else:
            ranges = _side_by_side([weights_OI[i] for i in some], scheme, [importance[i] for i in some])
            found |= zip(some, ranges, strict=True)
    return [found[index] for index in range(len(weights_OI))]


def _weights_at_a_time(weight_OI: Tensor, scheme: QuantizationScheme) -> int:
    size, width = scheme.group_size, weight_OI.shape[1]
    if scheme.data_type not in BY_GROUP or not isinstance(size, int) or size <= 0 or width % size:
        return 1
    elements = CHUNK_ELEMENTS["cpu" if weight_OI.device.type == "cpu" else "gpu"]
    return max(1, elements // weight_OI.numel())


def _side_by_side(
    weights_OI: Sequence[Tensor], scheme: QuantizationScheme, importance: Sequence[Tensor | None]
) -> list[Range]:
    """Returns the ranges of weights; importance, (I,) or (G, K, K), is known of all or of none."""
    known = [own for own in importance if own is not None]
    joined = DATA_TYPES[scheme.data_type].search_range(
        torch.cat(list(weights_OI), dim=1), scheme, torch.cat(known) if known else None
    )
    parts = {name: tensor.chunk(len(weights_OI), dim=1) for name, tensor in joined.items()}
    return [{name: pieces[index] for name, pieces in parts.items()} for index in range(len(weights_OI))]
