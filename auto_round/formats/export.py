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
from auto_round.config import MODEL_DTYPES, RunConfig
from auto_round.errors import ConfigError
from auto_round.extra_tensors import extra_matrices
from auto_round.formats.base import EXPORTERS, Exporter, FileExporter, FormatTarget, check, targets
from auto_round.formats.packing import Joints, Packing, in_stored_names
from auto_round.formats.written import listed
from auto_round.memory import release_freed
from auto_round.option_values import parse_size
from auto_round.plan import Plan
from auto_round.shards import ShardWriter, clear_weights
from auto_round.store import RunStore
from auto_round.tensors import BlockResult

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
    opened = OpenExport(exporter, folder, plan, source, config)
    owner = _owners(plan)
    by_block: dict[str, list[str]] = {}
    for key, name in source.keys().items():
        by_block.setdefault(owner(name), []).append(key)
    for block, block_keys in by_block.items():
        result = store.load(block) if block and store.has(block) else BlockResult({})
        for key in block_keys:
            opened.write(opened.tensors_of(key, result))
        opened.write(result.cache_scales)
        release_freed()
    for name in opened.unstored():
        opened.write(opened.tensors_of(name, store.load(HEAD_BLOCK)))
    opened.close(tokenizer)


class OpenExport:
    """A checkpoint that is being written, one stored tensor of the source after the other.

    Args:
        folder: made if need be; weights of an earlier export in it are removed.
    """

    def __init__(self, exporter: Exporter, folder: Path, plan: Plan, source: WeightSource, config: RunConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        clear_weights(folder)
        self.exporter, self.folder, self.plan, self.source, self.config = exporter, folder, plan, source, config
        self._asked = MODEL_DTYPES[config.model_dtype] if config.model_dtype else None
        self._writer = ShardWriter(folder, parse_size(config.max_shard_size))
        self._keys = source.keys()
        self._packing = Packing.of(exporter, plan)
        self._joints = Joints(source, self._packing)

    def tensors_of(self, key: str, result: BlockResult, original: Tensor | None = None) -> dict[str, Tensor]:
        """Returns what is written in place of a stored tensor. Changes nothing, so that threads may call it at once.

        Args:
            key: its checkpoint key, or one of `unstored`.
            result: with its quantized weight, if there is one.
            original: the tensor itself; None: it is read if need be.
        """
        packing, name = self._packing, self._keys.get(key, key)
        weight = result.weights.get(name or "")
        if weight is None:
            dtype = _torch_dtype(packing.copied_dtype(name, self._asked))
            tensor = result.plain[name] if name in result.plain else original
            tensor = self.source.read(key) if tensor is None else tensor
            return {key: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor}
        layout, layer = packing.layout(name or ""), key.removesuffix(".weight")
        if layout is not None:
            return {f"{layer}.{local}": tensor for local, tensor in layout.pack(weight).items()}
        dense = weight.dequantize(_torch_dtype(self._asked) or self._dtype_of(key))
        return {f"{layer}.weight": dense.t().contiguous() if packing.entries[name or ""].layer.transposed else dense}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors of `tensors_of`; slices of a fused tensor that is written as one wait for the others."""
        for stored_key, tensor in self._joints.joined(tensors).items():
            self._writer.add(stored_key, tensor)

    def unstored(self) -> list[str]:
        """Returns the quantized weights that the source does not store: an output layer tied to the embedding."""
        stored = set(self._keys.values())
        return [name for name in self.plan.outside() if name not in stored]

    def close(self, tokenizer: Any) -> None:
        """Finishes the weights; writes configs and side files.

        Args:
            tokenizer: saved beside the model when the source is no folder; may be None.
        """
        self._writer.close()
        extra = extra_matrices(self.source)
        if extra:
            carried = listed(f"carried over {len(extra)}", extra)[0]
            logger.info("%s: %s, which the model does not know", self.folder, carried)
        _write_configs(self.exporter, self.folder, self.plan, self.source, self.config)
        if self.source.folder is not None:
            copy_side_files(self.source.folder, self.folder)
        else:
            _save_side_files(self.source.model, tokenizer, self.folder)

    def _dtype_of(self, key: str) -> torch.dtype:
        if key in self._keys:
            return self.source.outline(key).dtype
        return self.source.tensors(key.removesuffix(".weight"))[key].dtype


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
