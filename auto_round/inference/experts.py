"""Quantized experts in Transformers: fused modules are replaced before loading, so that each expert has its own layers.

Transformers would fuse the experts of a checkpoint while it loads them. For one load of one model these conversions are
taken out, so that the tensors of an expert reach the layers of that expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from auto_round.conversion import expert_leaves, fuses_experts, model_conversions
from auto_round.inference.config import CheckpointConfig
from auto_round.models.experts import LinearExperts, fused_experts

SIXTEEN = 16


def unfuse_quantized_experts(
    model: nn.Module, config: CheckpointConfig, stored_name: Callable[[str], str]
) -> list[str]:
    """Replaces the fused experts that a checkpoint holds one by one, in place, and returns their names.

    Args:
        model: not loaded yet.
        config: which experts are quantized.
        stored_name: the name of a module in the checkpoint.
    """
    layouts = fused_experts(model)
    gate, up, down = expert_leaves(model)

    def is_quantized(module: str) -> bool:
        if config.is_listed_as_plain(module, stored_name(module)):
            return False
        names = (f"{module}.{index}.{leaf}" for index in range(layouts[module].count) for leaf in (gate, up, down))
        return any(config.resolve(name, stored_name(name)) is not None for name in names)

    chosen = [module for module in layouts if is_quantized(module)]
    if chosen and any(fuses_experts(entry) for entry in model_conversions(model)[1]):
        # All are stored one by one then, also those in 16 bits.
        chosen = list(layouts)
    for module in chosen:
        model.set_submodule(module, LinearExperts(model.get_submodule(module), layouts[module], (gate, up, down)))
    return chosen


def load_experts_by_name(model: nn.Module) -> None:
    """Makes the next load of a model leave out the conversions that fuse experts."""
    from transformers import PreTrainedModel, conversion_mapping

    replaced: dict[str, list[Any]] = {}
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        for name in (type(module).__name__, module.config.model_type):
            entries = conversion_mapping.get_checkpoint_conversion_mapping(name)
            if entries is not None:
                replaced[name] = [entry for entry in entries if _is_renaming(entry) or not fuses_experts(entry)]
                break
    for name, kept in replaced.items():
        _ReadOnce(kept).replace(conversion_mapping._checkpoint_conversion_mapping_cache, name)


def _is_renaming(entry: Any) -> bool:
    from transformers.core_model_loading import WeightRenaming

    return isinstance(entry, WeightRenaming)


class _ReadOnce(list):
    """Stands in Transformers' table of conversions until it is read, which happens by copying, and then leaves it.

    The table knows classes, not models: a lasting entry would break the next model of the class that is not quantized.
    """

    def replace(self, table: dict[str, Any], name: str) -> None:
        """Takes the place of an entry of the table."""
        self.table, self.name = table, name
        self.original = table[name]
        table[name] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        self.table[self.name] = self.original
        return [copy.deepcopy(entry, memo) for entry in self]
