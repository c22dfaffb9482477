"""Writes one checkpoint: packed weights from the store, everything else from the source, then configs and side files.

Reads block by block and writes shards as they fill, so memory stays at one shard whatever the model's size.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint import WeightSource, copy_side_files, without_quantization
from auto_round.config import MODEL_DTYPES, RunConfig, parse_size
from auto_round.errors import ConfigError
from auto_round.extra_tensors import extra_matrices
from auto_round.formats.base import EXPORTERS, Exporter, FileExporter, FormatTarget, check, targets
from auto_round.formats.packing import Joints, Packing, in_stored_names
from auto_round.formats.written import listed
from auto_round.memory import release_freed
from auto_round.plan import Plan
from auto_round.shards import ShardWriter, clear_weights
from auto_round.store import RunStore
from auto_round.tensors import BlockResult, QuantizedTensor

logger = logging.getLogger(__name__)

HEAD_BLOCK = "outside_blocks"


def export(
    exporter: Exporter,
    folder: Path,
    plan: Plan,
    source: WeightSource,
    store: RunStore,
    config: RunConfig,
    tokenizer: Any,
) -> None:
    """Writes the checkpoint of one format.

    Args:
        folder: made if need be; weights of an earlier export in it are removed first.
        tokenizer: saved beside the model when the source is no folder; may be None.
    Raises:
        ConfigError: `folder` is the folder of the original weights.
    """
    check_not_source(folder, source)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(exporter, FileExporter):
        exporter.write(folder, plan=plan, source=source, store=store, config=config, tokenizer=tokenizer)
        return
    clear_weights(folder)
    asked = MODEL_DTYPES[config.model_dtype] if config.model_dtype else None
    writer = ShardWriter(folder, parse_size(config.max_shard_size))
    owner = _owners(plan)
    keys = source.keys()
    packing = Packing.of(exporter, plan)
    joints = Joints(source, packing)
    by_block: dict[str, list[str]] = {}
    for key, name in keys.items():
        by_block.setdefault(owner(name), []).append(key)
    for block, block_keys in by_block.items():
        result = store.load(block) if block and store.has(block) else BlockResult({})
        for key in block_keys:
            dtype = _torch_dtype(packing.copied_dtype(keys[key], asked))
            written = _exported(packing, key, keys[key], source, result, dtype)
            for stored_key, tensor in joints.joined(written).items():
                writer.add(stored_key, tensor)
        for scale_name, scale in result.cache_scales.items():
            writer.add(scale_name, scale)
        release_freed()
    for stored_key, tensor in _untied_head(packing, source, store, _torch_dtype(asked)).items():
        writer.add(stored_key, tensor)
    writer.close()
    extra = extra_matrices(source)
    if extra:
        logger.info("%s: %s, which the model does not know", folder, listed(f"carried over {len(extra)}", extra)[0])
    _write_configs(exporter, folder, plan, source, config)
    if source.folder is not None:
        copy_side_files(source.folder, folder)
    else:
        _save_side_files(source.model, tokenizer, folder)


def checked_targets(names: tuple[str, ...], output_dir: Path, plan: Plan, source: WeightSource) -> list[FormatTarget]:
    """Returns formats and their folders; whatever would keep them from being written is an error here.

    Raises:
        ConfigError: an unknown format, or a folder that holds the original model.
        UnsupportedError: formats that cannot hold the plan, with every reason.
    """
    wanted = targets(names, output_dir)
    for target in wanted:
        check_not_source(target.folder, source)
    check(plan, [target.exporter for target in wanted])
    for target in wanted:
        for text in target.exporter.warnings(plan):
            _warn_once(f"{target.exporter.name}: {text}", id(plan))
    return wanted


@functools.lru_cache(maxsize=16)
def _warn_once(text: str, plan: int) -> None:  # noqa: ARG001
    """Logs a warning once for each plan: a run checks its formats twice, before its data are read and after."""
    logger.warning("%s", text)


def check_not_source(folder: Path, source: WeightSource) -> None:
    """Raises ConfigError if a checkpoint would be written over the weights that it is made from."""
    if source.folder is not None and folder.resolve() == source.folder.resolve():
        raise ConfigError(f"{folder} holds the original model, which would be lost. Give another --output_dir")


def _torch_dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _owners(plan: Plan) -> Any:
    """Returns a function from parameter name to the name its results are stored under ("" for none)."""
    block_of = {name: group[0] for group in plan.groups for name in group}
    outside = plan.outside()

    def owner(name: str | None) -> str:
        if name in outside:
            return HEAD_BLOCK
        parts = (name or "").split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((block_of[prefix] for prefix in prefixes if prefix in block_of), "")

    return owner


def _exported(
    packing: Packing,
    key: str,
    name: str | None,
    source: WeightSource,
    result: BlockResult,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Returns what is written in place of one stored tensor.

    Args:
        dtype: of the tensors that are not packed; None: as the source stores them.
    """
    weight = result.weights.get(name or "")
    if weight is None:
        tensor = result.plain[name] if name in result.plain else source.read(key)
        return {key: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor}
    own_dtype = dtype or source.outline(key).dtype
    return _packed(packing, key.removesuffix(".weight"), name or "", weight, own_dtype)


def _packed(packing: Packing, layer: str, name: str, weight: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    layout = packing.layout(name)
    if layout is None:
        dense = weight.dequantize(dtype)
        return {f"{layer}.weight": dense.t().contiguous() if packing.entries[name].layer.transposed else dense}
    return {f"{layer}.{local}": tensor for local, tensor in layout.pack(weight).items()}


def _untied_head(
    packing: Packing, source: WeightSource, store: RunStore, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Returns the tensors of a quantized output layer that the source does not store because it is tied."""
    stored = set(source.keys().values())
    tensors: dict[str, Tensor] = {}
    for name, entry in packing.plan.outside().items():
        if name not in stored:
            weight = store.load(HEAD_BLOCK).weights[name]
            own_dtype = dtype or source.tensors(entry.layer.name)[name].dtype
            tensors |= _packed(packing, entry.layer.name, name, weight, own_dtype)
    return tensors


def _write_configs(exporter: Exporter, folder: Path, plan: Plan, source: WeightSource, config: RunConfig) -> None:
    if source.folder is not None:
        stored = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        model_config = without_quantization(stored)
    else:
        model_config = json.loads(source.model.config.to_json_string(use_diff=True))
        model_config.setdefault("architectures", [type(source.model).__name__])
        model_config["dtype"] = str(source.model.dtype).removeprefix("torch.")
    if plan.structure.tied_head and f"{plan.structure.head}.weight" in plan.outside():
        for part in (model_config, model_config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    if config.model_dtype is not None:
        model_config["dtype"] = MODEL_DTYPES[config.model_dtype]
    quantization = exporter.quantization_config(in_stored_names(plan, source.keys()), config)
    for stale in {file for _, other in EXPORTERS.items() for file in other.container.config_files}:
        (folder / stale).unlink(missing_ok=True)  # of an earlier export
    if quantization is not None:
        model_config |= dict.fromkeys(exporter.container.config_keys, quantization)
        for file in exporter.container.config_files:
            _write_json(folder / file, quantization)
    _write_json(folder / "config.json", model_config)


def _save_side_files(model: Any, tokenizer: Any, folder: Path) -> None:
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
