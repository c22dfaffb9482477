"""What a model looks like to quantization: its lists of blocks and its linear layers, found by structure.

Works on any torch module, real or on the meta device. Knows nothing of schemes or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.registry import Registry

ROUTER = "router"


@dataclasses.dataclass(frozen=True, slots=True)
class LinearInfo:
    """One weight that a matrix product uses.

    Attributes:
        name: module name within the model.
        shape: (out features, in features).
        transposed: the parameter is stored (in, out), as in GPT-2's Conv1D.
        block: index of the block it is in, or None.
        kept: why it can only stay in 16 bits, "" if it need not.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    kept: str = ""

    @property
    def parameter(self) -> str:
        """Name of its weight parameter."""
        return f"{self.name}.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStructure:
    """Blocks and linear layers of a model, in the order the model runs them.

    Attributes:
        blocks: names of the decoder layers, e.g. "model.layers.0".
        linears: every linear layer of the model, inside blocks or not.
        block_lists: names of the module lists that the blocks are in.
        head: name of the output layer ("lm_head"), or None.
        tied_head: the output layer shares its weight with the embedding.
        other_weights: parameters of two and more dimensions that are no linear layer: name -> why they stay.
        fused_experts: modules of experts that Transformers loads from fused tensors only, not one by one.
        extra_modules: modules, by their names in the checkpoint, that the model's class does not know.
    """

    blocks: tuple[str, ...]
    linears: tuple[LinearInfo, ...]
    block_lists: tuple[str, ...]
    head: str | None
    tied_head: bool
    other_weights: dict[str, str]
    fused_experts: tuple[str, ...] = ()
    extra_modules: tuple[str, ...] = ()


class ModelFamily:
    """How to find blocks. The default goes by structure; a family overrides what structure does not tell.

    Attributes:
        expert_names: of an expert's gate, up and down projections, where checkpoints fuse them and thus have no names.
    """

    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def block_lists(self, model: nn.Module) -> list[str]:
        """Returns the names of the module lists that hold the decoder's layers.

        Raises:
            UnsupportedError: no list of layers was found.
        """
        candidates: dict[str, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(found + ".") for found in candidates):
                size = sum(p.numel() for p in module.parameters())
                if any(is_linear(child) for child in module.modules()):
                    candidates[name] = size
        if not candidates:
            raise UnsupportedError(
                f"{type(model).__name__} has no list of layers with linear weights. Name it with --to_quant_block_names"
            )
        beside = _beside_embedding(model, list(candidates))
        return [max(beside, key=lambda name: (-name.count("."), candidates[name]))]


def _beside_embedding(model: nn.Module, lists: list[str]) -> list[str]:
    """Returns the lists below the smallest module that holds the word embedding and any of them.

    That is the text decoder; a vision tower, which may be larger, lies elsewhere or deeper.
    """
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = get_embedding() if callable(get_embedding) else None
    place = next((name for name, module in model.named_modules() if module is embedding), "")
    while place:
        place = place.rpartition(".")[0]
        below = [name for name in lists if not place or name.startswith(place + ".")]
        if below:
            return below
    return lists


FAMILIES: Registry[ModelFamily] = Registry("model family")


def family_of(model: nn.Module) -> ModelFamily:
    """Returns the family registered for the model's `config.model_type`, or the default one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return FAMILIES[model_type] if model_type in FAMILIES else ModelFamily()


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, or GPT-2's transposed one. Those that do more (routers) are not."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer with an (in, out) weight (Transformers' Conv1D)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None


def discover(model: nn.Module, block_names: list[str] | None = None) -> ModelStructure:
    """Returns the structure of a model.

    Args:
        block_names: names of module lists to take as the blocks, instead of those found.
    Raises:
        UnsupportedError: no blocks were found, or a given name is no list of layers.
    """
    lists = block_names or family_of(model).block_lists(model)
    modules = dict(model.named_modules())
    blocks: list[str] = []
    for name in lists:
        if not isinstance(modules.get(name), nn.ModuleList):
            found = [n for n, m in modules.items() if isinstance(m, nn.ModuleList)]
            raise UnsupportedError(
                f"'{name}' is no list of layers of {type(model).__name__}. Lists: {', '.join(found)}"
            )
        blocks += [f"{name}.{index}" for index in range(len(modules[name]))]
    owner = {block: index for index, block in enumerate(blocks)}
    linears = tuple(
        LinearInfo(
            name,
            _linear_shape(module),
            is_transposed(module),
            _block_of(name, owner),
            _why_kept(name, modules),
        )
        for name, module in modules.items()
        if is_linear(module)
    )
    other = _other_weights(model, {linear.parameter for linear in linears}, owner)
    return ModelStructure(tuple(blocks), linears, tuple(lists), head_name(model), has_tied_head(model), other)


def _why_kept(name: str, modules: Mapping[str, nn.Module]) -> str:
    # torch's own mark: nn.MultiheadAttention multiplies with the weight itself and never calls the layer.
    if isinstance(modules[name], nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is used without the layer"
    return ROUTER if _is_router(name, modules) else ""


def keep_joined(
    structure: ModelStructure, stored: Collection[str | None], fused_experts: tuple[str, ...] = ()
) -> ModelStructure:
    """Returns the structure with those linear layers kept whose weights a checkpoint stores joined with others.

    Args:
        stored: names of the parameters that are stored as they are.
        fused_experts: modules of experts that are split again, but that Transformers loads fused only.
    """
    linears = [
        dataclasses.replace(linear, kept="the checkpoint stores it joined with other weights")
        if linear.parameter not in stored and not (structure.tied_head and linear.name == structure.head)
        else linear
        for linear in structure.linears
    ]
    return dataclasses.replace(structure, linears=tuple(linears), fused_experts=fused_experts)


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
    return (columns, rows) if is_transposed(module) else (rows, columns)


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module stands beside a list of experts and has no more outputs than there are experts.

    That is a router, or the gate of a shared expert with its single output.
    """
    experts = modules.get(f"{name.rpartition('.')[0]}.experts")
    count = len(experts) if isinstance(experts, nn.ModuleList) else 0
    weight = getattr(modules[name], "weight", None)
    return weight is not None and weight.ndim == 2 and weight.shape[0] <= count


def _block_of(name: str, owner: dict[str, int]) -> int | None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        index = owner.get(".".join(parts[:length]))
        if index is not None:
            return index
    return None


def head_name(model: nn.Module) -> str | None:
    """Returns the module name of the output layer, or None."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def has_tied_head(model: nn.Module) -> bool:
    """Whether the output layer shares its weight with the embedding.

    The parameters tell. Configs do not always: of two nested ones either may hold the flag that counts.
    """
    head = head_name(model)
    embedding = model.get_input_embeddings() if head is not None else None  # type: ignore[operator]
    return head is not None and getattr(embedding, "weight", None) is getattr(model.get_submodule(head), "weight", 0)


def _other_weights(model: nn.Module, linear_parameters: set[str], owner: dict[str, int]) -> dict[str, str]:
    reasons, modules = {}, dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in linear_parameters:
            continue
        inside = _block_of(name, owner) is not None
        reasons[name] = "not a linear layer" if inside else "embedding or other weight outside the blocks"
        if _is_router(name.rpartition(".")[0], modules):
            reasons[name] = ROUTER
        if parameter.ndim == 3 and inside:
            reasons[name] = "experts fused in a way that is not known are kept in 16 bits"
    return reasons
