"""What a GGUF mixture makes of each weight, as schemes for the plan. What speaks against it is found here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_round.checkpoint import WeightSource
from auto_round.config import RunConfig, SchemeConfig
from auto_round.errors import ConfigError
from auto_round.formats.gguf.contents import EMBEDDING, REARRANGED, Contents, FileTensor, contents_of
from auto_round.formats.gguf.mixes import FLOAT_TYPES, MIXES, fitting_type, tensor_type
from auto_round.formats.gguf.mmproj import refuse_unknown_tower
from auto_round.formats.gguf.vocabulary import saved_tokenizer, vocabulary_of
from auto_round.layouts.gguf_blocks import block_type_of
from auto_round.models.base import LinearInfo, ModelStructure
from auto_round.plan import SIXTEEN_BIT, Prescription
from auto_round.schemes import PRESET_SCHEMES, QuantizationScheme

# Bits in a layer_config -> block type; mixtures of plain blocks of 32 take those.
SUPER_BLOCKS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
PLAIN_BLOCKS = {"_0": {4: "Q4_0", 5: "Q5_0"}, "_1": {4: "Q4_1", 5: "Q5_1"}}


def prescribe(
    mix: str, structure: ModelStructure, source: WeightSource, tokenizer: Any, config: RunConfig
) -> Prescription:
    """Returns what a mixture makes of each weight of a model.

    Args:
        mix: key of MIXES.
    Raises:
        ConfigError: options that say something else.
        UnsupportedError: an architecture or a tokenizer that is not known.
    """
    problems = list(_contradictions(mix, config.scheme))
    if problems:
        raise ConfigError("\n".join(problems))
    contents = contents_of(source, structure)
    read_vocabulary(source, tokenizer, contents)
    refuse_unknown_tower(source)
    whole = [tensor for tensor in contents.tensors if tensor.parameters or tensor.is_kept]
    by_parameter = {part.parameter: tensor for tensor in whole for part in tensor.parts if part.parameter}
    embedding = [_as_layer(tensor) for tensor in contents.tensors if tensor.name == EMBEDDING]
    layers = (*structure.linears, *embedding)
    schemes = {layer.name: _scheme(layer, by_parameter.get(layer.parameter), mix, contents) for layer in layers}

    def override(layer: LinearInfo, fields: Mapping[str, Any]) -> QuantizationScheme:
        return _override(layer, by_parameter.get(layer.parameter), mix, fields)

    return Prescription(f"gguf:{mix}", scheme_of(MIXES[mix][0]), schemes, tuple(embedding), override)


def scheme_of(block_type: str) -> QuantizationScheme:
    """Returns the scheme of a block type; 16 bits for the float types."""
    return SIXTEEN_BIT if block_type in FLOAT_TYPES else PRESET_SCHEMES[f"GGUF:{block_type}"]


def read_vocabulary(source: WeightSource, tokenizer: Any, contents: Contents) -> dict[str, Any]:
    """Returns the keys of the vocabulary, from the model's folder or from a tokenizer in memory."""
    size, family = _vocabulary_size(contents), contents.family
    if source.folder is not None:
        return vocabulary_of(source.folder, size, family)
    with saved_tokenizer(tokenizer, source.model.config) as folder:
        return vocabulary_of(Path(folder), size, family)


def _vocabulary_size(contents: Contents) -> int:
    return next(tensor.shape[0] for tensor in contents.tensors if tensor.name == EMBEDDING)


def _as_layer(tensor: FileTensor) -> LinearInfo:
    rows, width = tensor.shape
    (name,) = tensor.parameters
    return LinearInfo(name.removesuffix(".weight"), (rows, width), transposed=False, block=None)


def _scheme(
    layer: LinearInfo, tensor: FileTensor | None, mix: str, contents: Contents
) -> tuple[QuantizationScheme, str]:
    if tensor is None:
        shared = layer.block is None
        return SIXTEEN_BIT, "shares the embedding's tensor" if shared else REARRANGED
    if tensor.is_kept:
        return SIXTEEN_BIT, "llama.cpp keeps it"
    size = contents.size
    block_type = tensor_type(tensor.name, layer.shape[1], mix, size)
    reason = f"{tensor.name} is {block_type} in {mix}"
    if tensor.name == EMBEDDING and not size.has_output:
        reason += ", output layer too"
    return scheme_of(block_type), reason


def _override(layer: LinearInfo, tensor: FileTensor | None, mix: str, fields: Mapping[str, Any]) -> QuantizationScheme:
    """Returns the scheme that a layer_config asks for.

    Raises:
        ConfigError: no block type is what was asked for, or the layer cannot be told apart.
    """
    if tensor is None and layer.block is None:
        raise ConfigError(f"layer_config: {layer.name} shares the embedding's tensor. Name the embedding instead")
    asked = fields.get("bits")
    if asked == 16:
        return SIXTEEN_BIT
    if tensor is None or tensor.is_kept:
        why = "llama.cpp keeps it in float32" if tensor else "its tensor is rearranged while it is written"
        raise ConfigError(f"layer_config: {layer.name} cannot be given a type: {why}. Leave it out")
    types = SUPER_BLOCKS | PLAIN_BLOCKS.get(MIXES[mix][0][-2:], {})
    if set(fields) == {"bits"}:
        if asked not in types:
            raise ConfigError(f"layer_config: gguf has no type of {asked} bits (only {', '.join(map(str, types))}, 16)")
        return scheme_of(fitting_type(types[asked], layer.shape[1]))
    block_type = block_type_of(QuantizationScheme.from_dict(fields))
    return scheme_of(fitting_type(block_type, layer.shape[1]))


def _contradictions(mix: str, config: SchemeConfig) -> Iterator[str]:
    """Yields the options that say something else than the format."""
    base, name = scheme_of(MIXES[mix][0]), f"gguf:{mix}"
    if config.scheme is not None:
        given = config.scheme
        is_same = isinstance(given, str) and given.strip().lower() in (name, f"gguf:{MIXES[mix][0].lower()}")
        if not is_same and config.base_scheme() != base:
            yield f"scheme={given} contradicts --format {name}, which says what each weight becomes. Leave out --scheme"
    for field in dataclasses.fields(QuantizationScheme):
        value, own = getattr(config, field.name), getattr(base, field.name)
        if value is not None and value != own:
            yield f"{field.name}={value} contradicts --format {name} ({field.name}={own}). Leave it out"
    if config.quant_nontext_module:
        yield f"quant_nontext_module: {name} keeps vision towers in 16 bits, in a file of their own. Leave it out"
    if config.static_kv_dtype is not None:
        yield f"static_kv_dtype={config.static_kv_dtype}: {name} has no scales of a cache. Leave it out"
