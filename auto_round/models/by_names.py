"""What a model looks like to quantization when only the names and shapes of its tensors are known, not its code.

Checkpoints number the layers of a list: `model.layers.17.mlp.up_proj.weight`. The list that stands beside the word
embedding is the decoder; matrices in it are linear layers but for a few whose names tell otherwise. Where the code is
known, the result is that of `models.base.discover`, in the names of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from auto_round.errors import UnsupportedError
from auto_round.models.base import ROUTER, LinearInfo, ModelStructure
from auto_round.models.experts import DOWN, FusedLayout, layout_of_shapes

Shapes = Mapping[str, tuple[int, ...]]
WEIGHT = ".weight"
EXPERTS = ".experts"
# Modules whose matrix is no linear layer: embeddings and tables of positions, norms (of heads, with a row for each).
EMBEDDING = re.compile(r"embed|(^|_)(wte|wpe)$|relative_attention_bias|position", re.IGNORECASE)
NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
TEXT_PARTS = ("text_config", "llm_config", "language_config")  # where a config describes the language model
HEADS = ("lm_head", "embed_out", "output", "output_layer", "head")
# Parts that predict several tokens; the code of most models leaves them out.
EXTRA = re.compile(r"mtp|nextn|medusa|eagle", re.IGNORECASE)
# Models that hold experts as (E, I, O) -> whether gate and up projections alternate. Of others this is not known.
TRANSPOSED_EXPERTS = {"gpt_oss": True, "llama4": False, "llama4_text": False}
UNKNOWN_EXPERTS = "experts fused in a way that is not known are kept in 16 bits"
FUSED = re.compile(r"expert|moe|(input|output)_linear")
# Models whose code turns fused experts around when it loads them, so that it would not find single ones.
CONVERTED_EXPERTS = ("qwen3_vl_moe",)
NO_WORDS = re.compile(r"vis(ion|ual)|image|audio|speech|video|pos(ition|_)|wpe|patch|type", re.IGNORECASE)
VISION = re.compile(r"vis(ion|ual)|image|audio|speech|video", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What config.json says of the language model; None where it does not.

    Attributes:
        block_count: number of decoder layers. Further ones in the checkpoint are no part of the model.
        vocab_size: rows of the embedding.
        tied_head: the output layer shares its weight with the embedding.
        model_type: as registered in Transformers.
    """

    block_count: int | None = None
    vocab_size: int | None = None
    tied_head: bool = False
    model_type: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelFacts:
        """Returns the facts in a config.json, those of a nested language model first."""
        parts = [part for name in TEXT_PARTS if (part := config.get(name))]
        nested = {key: value for part in reversed([config, *parts][1:]) for key, value in part.items()}
        values = {**config, **nested}
        count = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if values.get(n)), None)
        tied = config.get("tie_word_embeddings", values.get("tie_word_embeddings", False))
        return cls(count, values.get("vocab_size"), bool(tied), str(config.get("model_type", "")))


def fused_experts_of(shapes: Shapes, model_type: str) -> dict[str, FusedLayout]:
    """Returns module of experts -> how it holds them in one tensor for each projection, where that is known."""
    found = {}
    for key in shapes:
        module, _, leaf = key.rpartition(".")
        if leaf != DOWN or not f".{module}".endswith(EXPERTS) or len(shapes[key]) != 3:
            continue
        start = module + "."
        own = {k.removeprefix(start): s for k, s in shapes.items() if k.startswith(start)}
        if model_type in CONVERTED_EXPERTS:
            continue
        layout = layout_of_shapes(own, transposed=None, interleaved=False)
        if layout is None or (layout.transposed and layout.gated and model_type not in TRANSPOSED_EXPERTS):
            continue
        interleaved = layout.transposed and TRANSPOSED_EXPERTS.get(model_type, False)
        found[module] = dataclasses.replace(layout, interleaved=interleaved)
    return found


def discover_by_names(
    shapes: Shapes,
    facts: ModelFacts,
    block_lists: Sequence[str] | None = None,
    fused_experts: tuple[str, ...] = (),
) -> ModelStructure:
    """Returns the structure of a model, everything named as in its checkpoint.

    Args:
        shapes: checkpoint key -> shape; experts that are held in one tensor by their slices.
        block_lists: what to take as the lists of blocks instead of what is found, e.g. "model.layers".
        fused_experts: modules whose slices `shapes` has in place of fused tensors.
    Raises:
        UnsupportedError: no list of layers was found, or a given name is none.
    """
    lists = _numbered_lists(shapes)
    chosen = list(block_lists) if block_lists else [_decoder(lists, shapes, facts)]
    unknown = [name for name in chosen if name not in lists]
    if unknown:
        raise UnsupportedError(f"'{unknown[0]}' is no list of layers of the checkpoint. Lists: {', '.join(lists)}")
    count = facts.block_count if not block_lists else None
    numbers = {name: [n for n in sorted(lists[name]) if count is None or n < count] for name in chosen}
    blocks = tuple(f"{name}.{number}" for name in chosen for number in numbers[name])
    extra = _extra_modules(shapes, lists, chosen, set(blocks))
    head = _head(shapes, facts, lists)
    owner = {block: index for index, block in enumerate(blocks)}
    transposed, experts = _transposed_lists(shapes, lists), _expert_counts(shapes)
    linears, other = [], {}
    for key in _in_order(shapes):
        if len(shapes[key]) < 2 or key.startswith(tuple(f"{module}." for module in extra)):
            continue
        block, name = _block_of(key, owner), key.removesuffix(WEIGHT)
        reason = "" if name == head else _why_no_linear(key, shapes[key], experts, inside=block is not None)
        if reason:
            other[key] = reason
            continue
        rows, width = shapes[key]
        turned = any(key.startswith(f"{name}.") for name in transposed) and len(shapes[key]) == 2 and block is not None
        kept = ROUTER if _is_router(name, rows, experts) else ""
        linears.append(LinearInfo(name, (width, rows) if turned else (rows, width), turned, block, kept))
    tied = facts.tied_head and head is not None
    if tied and f"{head}{WEIGHT}" not in shapes:
        rows, width = shapes[embedding_key(shapes, facts) or ""]
        linears.append(LinearInfo(head or "", (rows, width), transposed=False, block=None))
    return ModelStructure(blocks, tuple(linears), tuple(chosen), head, tied, other, fused_experts, extra)


def embedding_key(shapes: Shapes, facts: ModelFacts) -> str | None:
    """Returns the key of the word embedding, or None."""
    outside = [key for key in shapes if key.endswith(WEIGHT) and len(shapes[key]) == 2 and _first_list(key) is None]
    named = [key for key in outside if EMBEDDING.search(_leaf(key)) and not NO_WORDS.search(key)]
    sized = [key for key in named if facts.vocab_size is not None and shapes[key][0] >= facts.vocab_size]
    return max(sized or named, key=lambda key: (shapes[key][0], -len(key)), default=None)


def _numbered_lists(shapes: Shapes) -> dict[str, set[int]]:
    """Returns name of a list -> its numbers, for the outermost lists that hold matrices."""
    lists: dict[str, set[int]] = {}
    for key, shape in shapes.items():
        found = _first_list(key)
        if found is not None and key.endswith(WEIGHT) and len(shape) == 2:
            lists.setdefault(found[0], set()).add(found[1])
    return lists


def _first_list(key: str) -> tuple[str, int] | None:
    """Returns the outermost list that a key is in, and its number there."""
    found = re.match(r"(.+?)\.(\d+)\.", key)
    return None if found is None else (found[1], int(found[2]))


def _decoder(lists: Mapping[str, set[int]], shapes: Shapes, facts: ModelFacts) -> str:
    """Returns the list below the smallest module that holds the word embedding and any list."""
    able = [name for name in lists if not EXTRA.search(name)]
    if not able:
        raise UnsupportedError("the checkpoint has no numbered layers with matrices, which are what is quantized")
    sizes = dict.fromkeys(able, 0)
    for key, shape in shapes.items():
        found = _first_list(key)
        if found is not None and found[0] in sizes:
            sizes[found[0]] += _size(shape)
    place = (embedding_key(shapes, facts) or "").removesuffix(WEIGHT)
    below: list[str] = []
    while place and not below:
        place = place.rpartition(".")[0]
        below = [name for name in able if not place or name.startswith(f"{place}.")]
    below = below or [name for name in able if not VISION.search(name)] or able
    return max(below, key=lambda name: (-name.count("."), sizes[name]))


def _extra_modules(
    shapes: Shapes, lists: Mapping[str, set[int]], chosen: Collection[str], blocks: Collection[str]
) -> tuple[str, ...]:
    """Returns modules that the model's code does not have: layers beyond its count, and those named as such."""
    beyond = [f"{name}.{n}" for name in chosen for n in sorted(lists[name]) if f"{name}.{n}" not in blocks]
    named: dict[str, None] = {}
    for key in shapes:
        parts = key.split(".")[:-1]
        place = next((index for index, part in enumerate(parts) if EXTRA.search(part)), None)
        if place is not None and not any(key.startswith(f"{name}.") for name in chosen):
            named[".".join(parts[: place + 1])] = None
    return (*beyond, *named)


def _head(shapes: Shapes, facts: ModelFacts, lists: Mapping[str, set[int]]) -> str | None:
    """Returns the name of the output layer, or None; one that is tied and not stored is called as most models do."""
    named = [
        key.removesuffix(WEIGHT)
        for key in shapes
        if key.endswith(WEIGHT) and len(shapes[key]) == 2 and _leaf(key) in HEADS and _first_list(key) is None
        and facts.vocab_size in (None, shapes[key][0])
    ]  # fmt: skip
    if named:
        return min(named, key=lambda name: (name.count("."), len(name)))
    return "lm_head" if facts.tied_head and embedding_key(shapes, facts) and lists else None


def _why_no_linear(key: str, shape: Sequence[int], experts: Mapping[str, int], *, inside: bool) -> str:
    """Returns why a matrix or larger tensor is no linear layer, "" if it is one."""
    elsewhere = "not a linear layer" if inside else "embedding or other weight outside the blocks"
    if len(shape) == 3 and inside and FUSED.search(key):
        return UNKNOWN_EXPERTS
    name = key.removesuffix(WEIGHT)
    if len(shape) != 2 or name == key or EMBEDDING.search(_leaf(key)) or NORM.search(_leaf(key)):
        return elsewhere
    # The gate of a shared expert, with its one output, is a plain linear layer in the code of models; routers are not.
    return ROUTER if _is_router(name, shape[0], experts) and shape[0] > 1 else ""


def _is_router(name: str, rows: int, experts: Mapping[str, int]) -> bool:
    """Whether a layer stands beside experts and has no more outputs than there are experts, or is called a router."""
    return "router" in name or rows <= experts.get(name.rpartition(".")[0], 0)


def _expert_counts(shapes: Shapes) -> dict[str, int]:
    """Returns module -> how many experts it holds, as layers of their own or in tensors of three dimensions."""
    counts: dict[str, int] = {}
    for key, shape in shapes.items():
        listed = re.match(r"(.+)\.experts\.(\d+)\.", key)
        if listed is not None:
            counts[listed[1]] = max(counts.get(listed[1], 0), int(listed[2]) + 1)
        elif len(shape) == 3 and FUSED.search(key):
            parent = key.rpartition(".")[0]
            counts[parent] = counts[parent.rpartition(".")[0]] = shape[0]
    return counts


def _transposed_lists(shapes: Shapes, lists: Iterable[str]) -> list[str]:
    """Returns the lists whose matrices are stored (in, out), as those of GPT-2: biases have the length of the inputs'
    side, wherever the two sides differ."""
    found = []
    for name in lists:
        sides = [
            (shape, shapes[bias][0])
            for key, shape in shapes.items()
            if key.startswith(f"{name}.") and len(shape) == 2 and (bias := _bias_of(key)) in shapes
        ]
        telling = [(shape, length) for shape, length in sides if shape[0] != shape[1]]
        if telling and all(length == shape[1] for shape, length in telling):
            found.append(name)
    return found


def _bias_of(key: str) -> str:
    return f"{key.removesuffix(WEIGHT)}.bias"


def _block_of(key: str, owner: Mapping[str, int]) -> int | None:
    found = _first_list(key)
    return None if found is None else owner.get(f"{found[0]}.{found[1]}")


def _leaf(key: str) -> str:
    """Returns the name of the module that holds a tensor, without those around it."""
    return key.rpartition(".")[0].rpartition(".")[2]


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _in_order(keys: Iterable[str]) -> list[str]:
    """Returns keys in the order of their names, numbers by their value."""
    return sorted(keys, key=lambda key: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in key.split(".")])
