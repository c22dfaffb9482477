"""Names of tensors in a checkpoint and in the model. Alone in touching Transformers' weight-conversion interface.

Most tensors of a checkpoint are parameters of the model, some under another name. Experts that Transformers fuses are
unfused here (`models.experts`), so that each has a name in both; what a checkpoint itself stores fused is listed by its
slices, under the names that an unfused checkpoint would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.models.base import family_of
from auto_round.models.experts import ExpertSlice, FusedLayout, fused_experts, with_linear_experts

Leaves = tuple[str, str, str]
# Steps of conversions that put the weights of experts side by side, without changing them.
PLAIN_STEPS = ("MergeModulelist", "Concatenate")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Unfused:
    """A model whose experts are linear layers, and how the original fuses them.

    Attributes:
        model: shares everything but the experts with the original; the original itself if it fuses none.
        experts: module name -> how the original holds the experts.
        leaves: module name -> names of an expert's gate, up and down projections.
        is_stored_fused: checkpoints hold experts as the original does, and Transformers loads them in no other form.
    """

    model: nn.Module
    experts: Mapping[str, FusedLayout]
    leaves: Mapping[str, Leaves]
    is_stored_fused: bool = False

    def slices(self) -> dict[str, list[ExpertSlice]]:
        """Returns name of a fused tensor in the original -> its slices, those of biases included."""
        found = {}
        for module, layout in self.experts.items():
            names = [name for name, _ in self.model.get_submodule(module).named_parameters()]
            for fused in layout.tensors(with_bias=any(name.endswith(".bias") for name in names)):
                found[f"{module}.{fused}"] = layout.slices(fused, self.leaves[module])
        return found

    def join(self, fused: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns a fused tensor of the original, made of its slices by their full names in the model."""
        module, _, name = fused.rpartition(".")
        own = {key.removeprefix(module + "."): tensor for key, tensor in tensors.items()}
        return self.experts[module].join(name, own, self.leaves[module])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FusedKey:
    """A stored tensor that holds the weights of many experts.

    Attributes:
        name: of the fused tensor in the original model.
        parts: key that a slice would have if it were stored alone -> the slice.
        parameters: that key -> its parameter in the unfused model.
    """

    name: str
    parts: Mapping[str, ExpertSlice]
    parameters: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KeyMap:
    """What the tensors of a checkpoint are.

    Attributes:
        names: key -> parameter of the unfused model, or None; slices of fused tensors stand for these.
        converted: key -> first target of a conversion that is no renaming.
        fused: key of a stored tensor -> what it holds.
    """

    names: Mapping[str, str | None]
    converted: Mapping[str, str]
    fused: Mapping[str, FusedKey]


def unfuse(model: nn.Module) -> Unfused:
    """Returns a model whose experts are linear layers, named as in checkpoints; the given one stays as it is."""
    converters = [entry for entry in model_conversions(model)[1] if fuses_experts(entry)]
    known = all(type(step).__name__ in PLAIN_STEPS for entry in converters for step in entry.operations)
    experts = fused_experts(model) if known else {}
    leaves = dict.fromkeys(experts, expert_leaves(model))
    is_stored_fused = bool(experts) and not converters
    return Unfused(with_linear_experts(model, experts, leaves), experts, leaves, is_stored_fused)


def map_keys(keys: Iterable[str], unfused: Unfused) -> KeyMap:
    """Returns what the tensors of a checkpoint are in a model."""
    renamings, converters = conversions(unfused)
    meta, slices = dict(unfused.model.state_dict()), unfused.slices()
    names: dict[str, str | None] = {}
    converted, fused = {}, {}
    for key in keys:
        target, pattern = _rename(key, renamings, converters, unfused.model, meta)
        target = _with_prefix(target, getattr(unfused.model, "base_model_prefix", ""), slices)
        if pattern is None and target in slices:
            fused[key] = _fused_key(key, target, slices[target])
            names |= fused[key].parameters
            continue
        names[key] = target if pattern is None and target in meta else None
        if pattern is not None:
            converted[key] = target
    if unfused.is_stored_fused:
        fused |= _stored_one_by_one(names, {held.name for held in fused.values()}, unfused)
    return KeyMap(names, converted, fused)


def _stored_one_by_one(
    names: Mapping[str, str | None], found: Collection[str], unfused: Unfused
) -> dict[str, FusedKey]:
    """Returns the fused tensors whose slices are stored alone, as those of quantized experts are.

    What loads the 16-bit model wants them fused again.

    Args:
        names: checkpoint key -> parameter of the unfused model.
        found: fused tensors that are stored as such.
    """
    keys = {name: key for key, name in names.items() if name is not None}
    joined = {}
    for target, slices in unfused.slices().items():
        parameters = {piece: f"{target.rpartition('.')[0]}.{piece.parameter}" for piece in slices}
        if target not in found and all(name in keys for name in parameters.values()):
            (key,) = stored_keys(unfused.model, {target: torch.empty(0, device="meta")})
            parts = {keys[name]: piece for piece, name in parameters.items()}
            joined[key] = FusedKey(target, parts, {keys[name]: name for name in parameters.values()})
    return joined


def conversions(unfused: Unfused) -> tuple[list[Any], list[Any]]:
    """Returns Transformers' renamings and converters between checkpoint and model, without those that fuse experts."""
    renamings, converters = model_conversions(unfused.model)
    return renamings, [entry for entry in converters if not (unfused.experts and fuses_experts(entry))]


def fuses_experts(converter: Any) -> bool:
    """Whether a converter makes the weights of all experts one tensor."""
    return any(".experts." in f".{target}" for target in converter.target_patterns)


def stored_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what save_pretrained would store of a state, by checkpoint key."""
    if not hasattr(model, "save_pretrained"):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(state)))


def expert_leaves(model: nn.Module) -> Leaves:
    """Returns the names of an expert's gate, up and down projections in checkpoints: as the conversion has them."""
    gate, up, down = family_of(model).expert_names
    for converter in model_conversions(model)[1]:
        sources = [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in converter.source_patterns]
        target = converter.target_patterns[0]
        if not fuses_experts(converter) or not all(source.isidentifier() for source in sources):
            continue
        if target.endswith("gate_up_proj") and len(sources) == 2:
            gate, up = sources
        elif target.endswith("up_proj") and len(sources) == 1:
            up = sources[0]
        elif target.endswith("down_proj") and len(sources) == 1:
            down = sources[0]
    return gate, up, down


def _fused_key(key: str, target: str, slices: Iterable[ExpertSlice]) -> FusedKey:
    """Returns what a fused tensor holds. Its slices are named after its key, if that ends as the model's name does."""
    module, _, name = target.rpartition(".")
    tail = f"experts.{name}"
    stem = key.removesuffix(tail) + "experts" if key.endswith(tail) else module
    found = list(slices)
    return FusedKey(
        target,
        {f"{stem}.{piece.parameter}": piece for piece in found},
        {f"{stem}.{piece.parameter}": f"{module}.{piece.parameter}" for piece in found},
    )


def _with_prefix(target: str, prefix: str, slices: Mapping[str, Any]) -> str:
    """Returns the name of a fused tensor with or without the prefix of the base model, as the model has it."""
    other = target.removeprefix(prefix + ".") if target.startswith(prefix + ".") else f"{prefix}.{target}"
    return other if target not in slices and other in slices else target


def model_conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Returns Transformers' renamings and converters between checkpoint and model."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if not isinstance(entry, WeightRenaming)]


def _rename(
    key: str, renamings: list[Any], converters: list[Any], model: nn.Module, meta: dict[str, Any]
) -> tuple[str, str | None]:
    from transformers.core_model_loading import rename_source_key

    prefix = getattr(model, "base_model_prefix", None)
    found: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, meta)
    return found
