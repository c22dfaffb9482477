"""The tensors of a GGUF file: which stored tensors each is made of, in which order they stand, which type they take.

Nothing is read but shapes. The writer and the check after it both work from this list.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.errors import UnsupportedError, require
from auto_round.formats.gguf.families import GGUF_FAMILIES, GgufFamily, Place
from auto_round.formats.gguf.families.base import Config, Names
from auto_round.formats.gguf.mixes import FLOAT_TYPES, ModelSize, is_kept, tensor_type
from auto_round.formats.gguf.vision import vision_family
from auto_round.layouts.gguf_blocks import block_type_of
from auto_round.models.base import ModelStructure
from auto_round.plan import Plan

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Reason in the plan of a layer that is 16-bit there and quantized nevertheless.
REARRANGED = "rearranged, rounded while it is written"
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor that goes into a tensor of the file.

    Attributes:
        key: checkpoint key.
        parameter: name within the model, or None where it is no 1:1 copy.
        place: how it goes in.
    """

    key: str
    parameter: str | None
    place: Place


@dataclasses.dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: rows last but one, as in torch; the file has it backwards.
        stored: dtype of what it is made of.
        parts: in the order of experts.
        constant: its values, where no checkpoint stores them.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    parts: tuple[Part, ...]
    constant: Tensor | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it holds as they are, rows reordered or not: one, or one for each expert."""
        names = tuple(part.parameter for part in self.parts if part.parameter and part.place.change is None)
        return names if len(names) == len(self.parts) else ()

    @property
    def is_kept(self) -> bool:
        """Whether it is float32 in every mixture."""
        return is_kept(self.name, len(self.shape))


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """Everything that a file holds of a model's weights.

    Attributes:
        family: the architecture.
        config: config of the text model as a dictionary.
        tensors: in the order of the file.
        dropped: keys that are left out -> why.
    """

    family: GgufFamily
    config: Config
    tensors: tuple[FileTensor, ...]
    dropped: Mapping[str, str]

    @property
    def size(self) -> ModelSize:
        """What the rules of mixtures look at."""
        names = [tensor.name for tensor in self.tensors]
        found = (re.fullmatch(r"blk\.(\d+)\.attn_(v|qkv|kv_b)\.weight", name) for name in names)
        heads = self.config["num_attention_heads"]
        experts = next((self.config[key] for key in EXPERT_COUNTS if self.config.get(key)), 0)
        return ModelSize(
            layers=self.config["num_hidden_layers"],
            heads=heads,
            kv_heads=self.family.metadata(self.config)["attention.head_count_kv"],  # type: ignore[arg-type]
            experts=experts,
            has_output=OUTPUT in names,
            value_layers=tuple(sorted(int(one[1]) for one in found if one)),
        )


EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def family_for(source: WeightSource) -> tuple[GgufFamily, Config]:
    """Returns the architecture of a model and its config.

    Raises:
        UnsupportedError: an architecture or a variant that is not listed.
    """
    config = source.model.config.get_text_config().to_dict()  # type: ignore[union-attr,operator]
    kind = config.get("model_type")
    if kind not in GGUF_FAMILIES:
        known: dict[str, list[str]] = {}
        for name, one in GGUF_FAMILIES.items():
            known.setdefault(one.title, []).append(name)
        listed = "; ".join(f"{title} ({', '.join(names)})" for title, names in known.items())
        raise UnsupportedError(f"gguf: the architecture {kind} is not known. Known: {listed}. {OTHER_WAY}")
    family = GGUF_FAMILIES[kind]
    objection = family.objection(config) or _rope_objection(config, family)
    if objection is not None:
        raise UnsupportedError(f"gguf: {family.title}: this model has {objection}. {OTHER_WAY}")
    return family, config


OTHER_WAY = (
    "Use --format auto_round for other engines, or --format fake and llama.cpp's convert_hf_to_gguf.py and "
    "llama-quantize on the result"
)


def _rope_objection(config: Config, family: GgufFamily) -> str | None:
    rope = config.get("rope_parameters") or {}
    known = ROPES if family.arch != "phi3" else (*ROPES, "longrope")  # elsewhere its factors would be lost
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = one.get("rope_type", "default")
        if kind not in known:
            return f"rope_type={kind} (known: {', '.join(known)})"
    return None


ROPES = ("default", "linear", "yarn", "llama3")


def contents_of(source: WeightSource, structure: ModelStructure) -> Contents:
    """Returns the tensors of a file for a model.

    Raises:
        UnsupportedError: an architecture that is not listed, or stored tensors that it does not know.
    """
    family, config = family_for(source)
    names, ignored, twins = _names(family, config), source.ignored(), _twins(source, structure)
    vision = _vision_keys(source)
    parts: dict[str, list[Part]] = {}
    dropped, unknown = {}, []
    for key, parameter in source.keys().items():
        if key in ignored or key in twins or key in vision:
            dropped[key] = "no part of the model" if key in ignored else "tied" if key in twins else "vision tower"
            continue
        # Experts have the checkpoint's names in the table where Transformers' differ.
        names_of_it = [_within_text_model(name) for name in (parameter, key) if name]
        places = next((found for name in names_of_it if (found := family.place(name, config, names))), [])
        unknown += [] if places else [key]
        for place in places:
            parts.setdefault(place.name, []).append(Part(key, parameter, place))
    if unknown:
        raise UnsupportedError(
            f"gguf: {family.title}: no name for {len(unknown)} tensors, e.g. {', '.join(unknown[:3])}. {OTHER_WAY}"
        )
    tensors = [_joined(name, found, source) for name, found in parts.items()]
    tensors += [FileTensor(name, tuple(t.shape), "float32", (), t) for name, t in family.tensors(config).items()]
    return Contents(family, config, tuple(sorted(tensors, key=_position)), dropped)


def types_of(contents: Contents, mix: str, plan: Plan, model_dtype: str | None) -> dict[str, str]:
    """Returns the type of each tensor: by the plan for what it quantizes, by the mixture for the rest.

    Args:
        model_dtype: of weights that stay as they are; None: as stored.
    """
    planned = {entry.layer.parameter: entry for entry in plan.entries}
    size, found = contents.size, {}
    for tensor in contents.tensors:
        # Experts that lie in one tensor have one scheme: a plan in which they differ was refused.
        entry = next((planned[part.parameter] for part in tensor.parts if part.parameter in planned), None)
        if tensor.is_kept:
            found[tensor.name] = "F32"
        elif entry is not None and entry.scheme.is_quantized:
            found[tensor.name] = block_type_of(entry.scheme)
        else:
            wanted = tensor_type(tensor.name, tensor.shape[-1], mix, size)
            stays = entry is not None and entry.reason != REARRANGED and wanted not in FLOAT_TYPES
            found[tensor.name] = FLOAT_NAMES[model_dtype or tensor.stored] if stays else wanted
    return found


def _joined(name: str, parts: list[Part], source: WeightSource) -> FileTensor:
    """Returns the tensor that some stored ones make up: one as it is, or experts one above the other."""
    stored = source.read(parts[0].key)
    first = torch.empty(stored.shape, dtype=stored.dtype, device="meta")  # to know the shape, nothing need be moved
    change = parts[0].place.change
    shape = tuple((first if change is None else change(first)).shape)
    if parts[0].place.expert is None:
        assert len(parts) == 1, (name, [part.key for part in parts])
        return FileTensor(name, shape, _dtype_name(first), tuple(parts))
    ordered = sorted(parts, key=lambda part: part.place.expert or 0)
    assert [part.place.expert for part in ordered] == list(range(len(ordered))), name
    return FileTensor(name, (len(ordered), *shape), _dtype_name(first), tuple(ordered))


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _position(tensor: FileTensor) -> tuple[int, int]:
    """Returns a sorting key: embedding and rotary factors, blocks in order, then norm and output."""
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    if block:
        return 1, int(block[1])
    return (2, 0) if tensor.name.startswith("output") else (0, 0)


def _within_text_model(key: str) -> str:
    """Returns a key without what vision-language models put before their text model."""
    return re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", key)


def _vision_keys(source: WeightSource) -> set[str]:
    """Returns keys of a vision tower that goes into a file of its own."""
    tower = vision_family(source.model.config)
    return set() if tower is None else {key for key in source.keys() if tower.key_of(key) is not None}


def _twins(source: WeightSource, structure: ModelStructure) -> set[str]:
    """Returns keys of an output layer that is stored although it shares the embedding's weight."""
    head = f"{structure.head}.weight" if structure.tied_head else None
    return {key for key, name in source.keys().items() if name is not None and name == head}


def _names(family: GgufFamily, config: Config) -> Names:
    """Returns the package's table of names for one architecture."""
    gguf = gguf_package()
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    return lambda key: table.get_name(key, try_suffixes=(".weight", ".bias"))


def gguf_package() -> Any:
    """Returns the `gguf` package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    require("gguf", needed_for="GGUF export", install="'auto-round[gguf]'")
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every key otherwise
    return gguf
