"""Where weights come from: one prefix at a time, never a whole model.

`CheckpointSource` reads a folder of safetensors; `ModuleSource` a model in memory. Both give plain dictionaries of
tensors; the model object (on the meta device for a folder) serves as structure only. Experts are linear layers in both,
however the model and its checkpoint hold them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from auto_round.conversion import FusedKey, conversions, map_keys, stored_keys, unfuse
from auto_round.errors import CheckpointError, ConfigError
from auto_round.models.auto_class import auto_class
from auto_round.shards import INDEX_NAME
from auto_round.stored_tensors import PICKLED_INDEX_NAME, NamedTensors, SlicedTensors, StoredTensors

# Where a quantization is described: in config.json, and in files of its own beside it.
QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")
# What a folder says of the run that wrote its weights; it does not travel with copies of them.
REPORT_FILES = ("quality.json", "quality.html")
QUANTIZATION_FILES = ("quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")


class WeightSource(Protocol):
    """Reads weights by module name (for tuning) and by checkpoint key (for export).

    Attributes:
        model: the structure; its experts are linear layers.
        original: the model that was given, or the same as `model`.
    """

    model: nn.Module
    original: nn.Module
    folder: Path | None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns parameters and buffers below a module, by full name within the model, on the CPU."""
        ...

    def keys(self) -> dict[str, str | None]:
        """Returns checkpoint key -> parameter name within the model, or None where it is no 1:1 copy."""
        ...

    def read(self, key: str) -> Tensor:
        """Returns the tensor stored under a checkpoint key."""
        ...

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of what `read` would return: a tensor on the meta device. Costs no read."""
        ...

    def ignored(self) -> set[str]:
        """Returns the keys of stored tensors that no part of the model takes, e.g. rotary tables of older releases."""
        ...

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns key of a stored tensor that holds many experts -> the keys that `keys` has in its place."""
        ...

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused tensor of a key of `fused`, made of the tensors in its place by their keys."""
        ...

    def fused_experts(self) -> tuple[str, ...]:
        """Returns the modules of experts that Transformers loads from fused tensors only, not one by one."""
        ...


class CheckpointSource:
    """A folder of safetensors (or pickled weights, converted once by torch's weights_only loader).

    Args:
        folder: with config.json and weights.
        trust_remote_code: run model code that lies in the folder.
    Raises:
        CheckpointError: no or unreadable weights.
        ConfigError: the model needs its own code and `trust_remote_code` is off.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._fill(folder, StoredTensors(folder), meta_model(folder, trust_remote_code=trust_remote_code))

    @classmethod
    def reopened(cls, folder: Path, stored: NamedTensors, *, trust_remote_code: bool = False) -> CheckpointSource:
        """Returns a source with the model of a written folder, quantized or not, and tensors from elsewhere.

        Args:
            stored: checkpoint key -> tensor, packed weights given dequantized.
        """
        return cls.of(folder, stored, structure_of(folder, trust_remote_code=trust_remote_code))

    @classmethod
    def of(
        cls, folder: Path, stored: NamedTensors, model: nn.Module, *, unwanted: Callable[[str], bool] | None = None
    ) -> CheckpointSource:
        """Returns a source of the tensors of a folder, given a model that `structure_of` returned.

        Args:
            unwanted: tells keys that are left out where no part of the model takes them.
        """
        source = cls.__new__(cls)
        source._fill(folder, stored, model)
        gone = {key for key in source.ignored() if unwanted is not None and unwanted(key)}
        names = {key: name for key, name in source._map.names.items() if key not in gone}
        source._map = dataclasses.replace(source._map, names=names)
        return source

    def _fill(self, folder: Path, stored: NamedTensors, model: nn.Module) -> None:
        self.folder: Path | None = folder
        self.stored = stored
        self._unfused = unfuse(model)
        self.model = self.original = self._unfused.model
        self._map = map_keys(stored, self._unfused)
        places = {
            part: (key, piece)
            for key, held in self._map.fused.items()
            for part, piece in held.parts.items()
            if key in stored
        }
        self._sliced = SlicedTensors(stored, places)

    def keys(self) -> dict[str, str | None]:
        """Returns checkpoint key -> parameter name within the model, or None."""
        return dict(self._map.names)

    def read(self, key: str) -> Tensor:
        """Returns the tensor stored under a checkpoint key, or the slice that a key stands for."""
        return self._sliced.read(key)

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of what `read` would return, on the meta device."""
        return self._sliced.outline(key)

    def ignored(self) -> set[str]:
        """Returns the keys of stored tensors that no part of the model takes."""
        return {key for key, name in self._map.names.items() if name is None and key not in self._map.converted}

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns key of a stored tensor that holds many experts -> the keys that `keys` has in its place."""
        return {key: tuple(held.parts) for key, held in self._map.fused.items()}

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused tensor of a key of `fused`, made of the tensors in its place."""
        held = self._map.fused[key]
        return self._unfused.join(held.name, {held.parameters[part]: tensor for part, tensor in tensors.items()})

    def fused_experts(self) -> tuple[str, ...]:
        """Returns the modules of experts that Transformers loads from fused tensors only, not one by one."""
        return tuple(self._unfused.experts) if self._unfused.is_stored_fused else ()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns parameters and buffers below a module; an empty prefix means everything outside the blocks."""
        wanted = _below(prefix)
        found = {name: self.read(key) for key, name in self._map.names.items() if name is not None and wanted(name)}
        found.update(self._read_converted(prefix))
        module = self.model.get_submodule(prefix)
        dot = prefix + "." if prefix else ""
        for name, buffer in module.named_buffers():
            if not buffer.is_meta:
                found.setdefault(dot + name, buffer)
        for name, parameter in module.named_parameters():
            if dot + name not in found and (alias := self._stored_alias(parameter)) is not None:
                found[dot + name] = self.read(alias)
        missing = [dot + name for name, _ in module.named_parameters() if dot + name not in found]
        if missing:
            raise CheckpointError(f"{self.folder}: no weights for {', '.join(missing[:5])} ({len(missing)} in all)")
        return found

    def _stored_alias(self, parameter: Tensor) -> str | None:
        """Returns the key under which a tied parameter is stored."""
        tied = {name for name, p in self.model.named_parameters(remove_duplicate=False) if p is parameter}
        return next((key for key, name in self._map.names.items() if name in tied), None)

    def _read_converted(self, prefix: str) -> dict[str, Tensor]:
        """Returns tensors that Transformers makes of several stored ones, through its own loader."""
        wanted = _below(prefix)
        keys = [key for key, target in self._map.converted.items() if wanted(target)]
        if not keys:
            return {}
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        renamings, converters = conversions(self._unfused)
        config = LoadStateDictConfig(device_map={"": "cpu"}, weight_mapping=[*renamings, *converters])
        # An argument of Transformers before 5.17; tensor parallelism is not used here.
        takes = inspect.signature(convert_and_load_state_dict_in_model).parameters
        older = {"tp_plan": None} if "tp_plan" in takes else {}
        convert_and_load_state_dict_in_model(self.model, {key: self.read(key) for key in keys}, config, **older)
        loaded = {name: p.detach() for name, p in self.model.named_parameters() if wanted(name) and not p.is_meta}
        self.model.get_submodule(prefix).to("meta")
        return loaded


class ModuleSource:
    """A model in memory. Its tensors are handed out as they are; nobody changes them in place."""

    def __init__(self, model: nn.Module) -> None:
        self.original, self.folder = model, None
        self._unfused = unfuse(model)
        self.model = self._unfused.model
        self._stored, self._names, self._fused = self._stored_state()

    def keys(self) -> dict[str, str | None]:
        """Returns checkpoint key -> parameter name within the model, or None."""
        return self._names

    def read(self, key: str) -> Tensor:
        """Returns the tensor that is stored under a checkpoint key."""
        return self._stored[key].contiguous()

    def outline(self, key: str) -> Tensor:
        """Returns shape and dtype of what `read` would return, on the meta device."""
        return self._stored[key].to("meta").contiguous()

    def ignored(self) -> set[str]:
        """Returns nothing: a model holds no tensors that it does not take."""
        return set()

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns key of a tensor that holds many experts -> the keys that `keys` has in its place."""
        return {key: tuple(held.parts) for key, held in self._fused.items()}

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused tensor of a key of `fused`, made of the tensors in its place."""
        held = self._fused[key]
        return self._unfused.join(held.name, {held.parameters[part]: tensor for part, tensor in tensors.items()})

    def fused_experts(self) -> tuple[str, ...]:
        """Returns the modules of experts that Transformers loads from fused tensors only, not one by one."""
        return tuple(self._unfused.experts) if self._unfused.is_stored_fused else ()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns parameters and buffers below a module, by full name within the model."""
        module = self.model.get_submodule(prefix)
        dot = prefix + "." if prefix else ""
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {dot + name: tensor.detach().contiguous() for name, tensor in named}

    def _stored_state(self) -> tuple[dict[str, Tensor], dict[str, str | None], Mapping[str, FusedKey]]:
        """Returns what save_pretrained would store by checkpoint key, the parameter of each 1:1 entry, fused keys."""
        state = {name: tensor.detach() for name, tensor in self.original.state_dict(keep_vars=True).items()}
        state = {name: state[name] for name in _untied(state)}
        fused = self._unfused.slices()
        # Only the names of experts are wanted here: splitting real tensors would copy them.
        lean = {name: tensor.to("meta") if name in fused else tensor for name, tensor in state.items()}
        names_by_id = {id(tensor): name for name, tensor in lean.items() if name not in fused}
        own = dict(self.model.named_parameters())
        stored: dict[str, Tensor] = {}
        names: dict[str, str | None] = {}
        found = stored_keys(self.original, lean)
        experts = map_keys([key for key, tensor in found.items() if tensor.is_meta], self._unfused)
        for key, tensor in found.items():
            if not tensor.is_meta:
                stored[key], names[key] = tensor, names_by_id.get(id(tensor))
                continue
            held = experts.fused.get(key)
            for part, name in held.parameters.items() if held else [(key, experts.names[key])]:
                assert name is not None, f"{key} of {type(self.original).__name__} is no expert's weight"
                stored[part], names[part] = own[name].detach(), name
        return stored, names, experts.fused


def copy_side_files(source: Path, target: Path) -> None:
    """Copies every file of a checkpoint folder that holds no weights and no config of its own making.

    Tokenizer, processor, chat template, generation config, custom code and licence all travel.
    """
    skipped = {"config.json", INDEX_NAME, PICKLED_INDEX_NAME, *QUANTIZATION_FILES, *REPORT_FILES}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in skipped and file.suffix not in WEIGHT_SUFFIXES:
            if not file.name.startswith("."):
                shutil.copyfile(file, target / file.name)


def load_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """Returns the processor of pictures in a model's folder.

    Raises:
        ConfigError: there is none, or a package that it needs is missing.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip()[:300]
        raise ConfigError(f"{folder} has no processor that loads, which pictures need: {reason}") from error


def resolve_folder(model: str) -> Path:
    """Returns the local folder of a model path or hub name (downloaded to the hub cache).

    Raises:
        ConfigError: no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ConfigError(
            f"model '{model}': no such folder. Give a folder with config.json, or a hub name like org/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5"])
        )
    except Exception as error:  # the hub client raises many unrelated types
        raise ConfigError(f"model '{model}': no such folder, and the hub did not give it ({error})") from error


def meta_model(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Returns the model of an original folder with weights on the meta device and real buffers.

    Raises:
        ConfigError: no config.json, code in the folder that was not allowed to run, or a quantized model.
    """
    quantization = quantization_of(model_config(folder, trust_remote_code=trust_remote_code))
    if quantization is not None:
        raise ConfigError(f"{folder} is quantized already ({quantization.get('quant_method')})")
    return structure_of(folder, trust_remote_code=trust_remote_code)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the quantization_config in a config.json, or in its part about the language model; None: 16 bits."""
    own = config.get("quantization_config") or config.get("quantization") or config.get("compression_config")
    return own or (config.get("text_config") or {}).get("quantization_config") or None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json as it is when the weights are in 16 bits."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {k: v for k, v in kept["text_config"].items() if k not in QUANTIZATION_KEYS}
    return kept


def model_config(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """Returns config.json as it is stored, if the model's code may run."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: it is no model folder")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stored.get("auto_map") and not trust_remote_code:
        raise ConfigError(f"{folder} brings its own model code. Read it, then allow it with --trust_remote_code")
    return dict(stored)


def structure_of(folder: Path, *, trust_remote_code: bool) -> nn.Module:
    """Returns the model that config.json describes, as it was before quantization: linear layers are plain ones.

    Raises:
        ConfigError: no config.json, or code in the folder that was not allowed to run.
        UnsupportedError: no language or vision-language model that Transformers knows.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    model_config(folder, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    kind = auto_class(config)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def _below(prefix: str) -> Any:
    dot = prefix + "."
    return lambda name: not prefix or name.startswith(dot)


def _untied(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields the names of a state dict, each shared tensor once under the name of its first appearance."""
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and identity in seen and not tensor.is_meta:
            continue
        seen.add(identity)
        yield name
