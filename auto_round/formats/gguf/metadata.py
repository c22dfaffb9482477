"""The keys at the head of a GGUF file, and its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from auto_round.checkpoint import WeightSource
from auto_round.formats.gguf.contents import Contents, gguf_package
from auto_round.formats.gguf.families.base import Value
from auto_round.formats.gguf.mixes import MIXES

QUANTIZATION_VERSION = 2


def metadata_of(contents: Contents, mix: str, name: str, vocabulary: Mapping[str, Value]) -> dict[str, Value]:
    """Returns every key but the architecture, which the package writes itself."""
    found: dict[str, Value] = {
        "general.type": "model",
        "general.name": name,
        "general.size_label": size_label(contents),
        "general.file_type": MIXES[mix][1],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    own = contents.family.metadata(contents.config)
    found |= {f"{contents.family.arch}.{key}": value for key, value in own.items()}
    return found | {f"tokenizer.{key}": value for key, value in vocabulary.items()}


def size_label(contents: Contents) -> str:
    """Returns the number of parameters in words: "494M", or "8x7B" for experts."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in contents.tensors}
    of_experts = {
        tensor.name: len(tensor.parts) or tensor.shape[0] for tensor in contents.tensors if _is_expert(tensor)
    }
    counts = {t.shape[0] for t in contents.tensors if _is_expert(t)}
    experts = max(counts, default=0)
    each = sum(sizes[name] for name in of_experts) // max(experts, 1)
    shared = sum(sizes.values()) - sum(sizes[name] for name in of_experts)
    return str(gguf_package().size_label(sum(sizes.values()), shared, each, experts))


def _is_expert(tensor: Any) -> bool:
    return "_exps." in tensor.name and len(tensor.shape) == 3


def model_name(source: WeightSource) -> str:
    """Returns the name of the model: of its folder or hub repository."""
    if source.folder is not None:
        folder = source.folder.resolve()
        # Folders of the hub's cache are called after commits: models--org--name/snapshots/<commit>.
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return folder.parents[1].name.split("--")[-1]
        return folder.name
    given = str(getattr(source.model.config, "name_or_path", "")).rstrip("/").rpartition("/")[2]
    return given or type(source.model).__name__


def file_stem(contents: Contents, mix: str, name: str) -> str:
    """Returns the name of the file without its ending, as users of llama.cpp expect it: Model-494M-Q4_K_M."""
    kind = {"fp16": "F16"}.get(mix, mix.upper())
    return f"{name}-{size_label(contents)}-{kind}"


def add_value(writer: Any, key: str, value: Value) -> None:
    """Adds a key with the type that llama.cpp expects for such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
