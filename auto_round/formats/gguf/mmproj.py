"""Writes mmproj-<name>.gguf, the vision tower of a vision-language model, and reads it back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.errors import UnsupportedError
from auto_round.formats.gguf.contents import gguf_package
from auto_round.formats.gguf.families.base import Names, Place, Value
from auto_round.formats.gguf.metadata import add_value, model_name
from auto_round.formats.gguf.vision import FLOAT32, PATCHES, vision_family
from auto_round.formats.written import listed
from auto_round.layouts.gguf_blocks import float_bytes

PREFIX = "mmproj-"
LARGEST_FLOAT16 = 65504.0
FILE_TYPES = {"F16": 1, "BF16": 32}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class VisionTensor:
    """One tensor of the file: the stored one it is made of, and where it goes."""

    key: str
    place: Place

    def values(self, source: WeightSource) -> Tensor:
        """Returns its values."""
        stored = source.read(self.key)
        return (stored if self.place.change is None else self.place.change(stored)).detach()


def vision_tensors(source: WeightSource) -> tuple[VisionTensor, ...]:
    """Returns the tensors of the file.

    Raises:
        UnsupportedError: stored tensors that llama.cpp has no name for.
    """
    family = vision_family(source.model.config)
    assert family is not None
    names, found, unknown = _names(_vision_config(source)), [], []
    for key in source.keys():
        short = family.key_of(key)
        if short is None:
            continue
        places = family.place(short, names)
        found += [VisionTensor(key, place) for place in places]
        unknown += [] if places or ".head." in short else [key]
    if unknown:
        raise UnsupportedError(
            f"gguf: {family.title}: no name for {len(unknown)} tensors of the vision tower, e.g. {unknown[0]}"
        )
    return tuple(found)


def refuse_unknown_tower(source: WeightSource) -> None:
    """Raises UnsupportedError for a vision tower that llama.cpp computes otherwise, or has no names for."""
    if vision_family(source.model.config) is not None:
        vision_tensors(source)
        mmproj_metadata(source, "F16")


def mmproj_metadata(source: WeightSource, kind: str) -> dict[str, Value]:
    """Returns every key but the architecture.

    Args:
        kind: type of the matrices, F16 or BF16.
    """
    family, config = vision_family(source.model.config), _vision_config(source)
    assert family is not None
    text: Any = source.model.config.get_text_config()  # type: ignore[union-attr,operator]
    pixels = _preprocessor(source)
    return {
        "general.type": "mmproj",
        "general.name": model_name(source),
        "general.file_type": FILE_TYPES[kind],
        "clip.has_vision_encoder": True,
        "clip.projector_type": family.projector,
        "clip.vision.projection_dim": text.hidden_size,
        "clip.vision.patch_size": config["patch_size"],
        "clip.vision.image_mean": [float(value) for value in pixels.get("image_mean") or family.mean],
        "clip.vision.image_std": [float(value) for value in pixels.get("image_std") or family.std],
        **family.metadata(config),
    }


def type_of(name: str, values: Tensor, kind: str) -> str:
    """Returns the type of a tensor: that of the matrices, or F32 where llama.cpp computes in it."""
    if values.ndim < 2 or name in FLOAT32:
        return "F32"
    if kind == "BF16" and name.startswith(PATCHES):
        return "F32"  # not every backend convolves in bfloat16
    return "BF16" if kind == "F16" and bool(values.abs().amax() > LARGEST_FLOAT16) else kind


def mmproj_path(folder: Path, source: WeightSource) -> Path:
    """Returns the path of the file."""
    return folder / f"{PREFIX}{model_name(source)}.gguf"


def write_mmproj(folder: Path, mix: str, source: WeightSource) -> Path | None:
    """Writes the file and returns its path; None for a model without a vision tower.

    Args:
        mix: of the text model; only bf16 makes a difference, else matrices are F16.
    """
    if vision_family(source.model.config) is None:
        return None
    gguf, kind, path = gguf_package(), matrix_type(mix), mmproj_path(folder, source)
    tensors = vision_tensors(source)
    writer = gguf.GGUFWriter(path, "clip")
    for key, value in mmproj_metadata(source, kind).items():
        add_value(writer, key, value)
    for tensor in tensors:
        values = tensor.values(source)
        chosen = type_of(tensor.place.name, values, kind)
        data = float_bytes(values, chosen).reshape(-1)
        shape = (*values.shape[:-1], data.numel() // max(values.shape[:-1].numel(), 1))
        number = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(tensor.place.name, data.numpy().reshape(shape), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrix_type(mix: str) -> str:
    """Returns the type of the vision tower's matrices beside a text model of some mixture."""
    return "BF16" if mix == "bf16" else "F16"


def check_mmproj(folder: Path, mix: str, source: WeightSource) -> list[str]:
    """Returns what is wrong with the written file: all tensors are read back."""
    if vision_family(source.model.config) is None:
        return []
    path = mmproj_path(folder, source)
    if not path.is_file():
        return [f"{path.name} is missing"]
    found = {tensor.name: tensor for tensor in gguf_package().GGUFReader(path).tensors}
    wanted = {tensor.place.name: tensor for tensor in vision_tensors(source)}
    problems = listed(f"tensors missing from {path.name}", wanted.keys() - found.keys())
    problems += listed(f"tensors of {path.name} that nobody asked for", found.keys() - wanted.keys())
    wrong = [n for n in wanted.keys() & found.keys() if not _same(found[n], wanted[n].values(source), matrix_type(mix))]
    return problems + listed(f"tensors of {path.name} that do not read back", wrong)


def _same(found: Any, values: Tensor, kind: str) -> bool:
    chosen = type_of(found.name, values, kind)
    decoded = torch.from_numpy(gguf_package().dequantize(found.data, found.tensor_type).copy())
    if found.tensor_type.name != chosen or decoded.numel() != values.numel():
        return False
    return torch.equal(decoded.reshape(values.shape).float(), values.to(DTYPES[chosen]).float())


def _vision_config(source: WeightSource) -> dict[str, Any]:
    config = source.model.config.to_dict()  # type: ignore[union-attr,operator]
    whole: Mapping[str, Any] = config
    return {"mm_tokens_per_image": whole.get("mm_tokens_per_image", 256), **whole["vision_config"]}


def _preprocessor(source: WeightSource) -> dict[str, Any]:
    """Returns what the model's folder says of pixels."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = None if source.folder is None else source.folder / name
        if path is not None and path.is_file():
            read = json.loads(path.read_text(encoding="utf-8"))
            found |= {**read, **read.get("image_processor", {})}
    return found


def _names(config: Mapping[str, Any]) -> Names:
    gguf = gguf_package()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.get("depth") or config["num_hidden_layers"])
    return lambda key: table.get_name(key, try_suffixes=(".weight", ".bias"))
