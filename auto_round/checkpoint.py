"""Where weights come from: one prefix at a time, never a whole model.

`CheckpointSource` reads a folder of safetensors; `ModuleSource` a model in memory. Both give plain dictionaries of
tensors; the model object (on the meta device for a folder) serves as structure only. Experts are linear layers in both,
however the model and its checkpoint hold them.
"""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from auto_round.conversion import FusedKey, conversions, map_keys, stored_keys, unfuse
from auto_round.errors import CheckpointError, ConfigError
from auto_round.models.auto_class import auto_class
from auto_round.shards import INDEX_NAME

PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
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

    def ignored(self) -> set[str]:
        """Returns the keys of stored tensors that no part of the model takes, e.g. rotary tables of older releases."""
        ...

    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """Returns key of a stored tensor that holds many experts -> the keys that `keys` has in its place."""
        ...

    def join(self, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the fused tensor of a key of `fused`, made of the tensors in its place by their keys."""
        ...


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder by checkpoint key, each read when it is asked for. Files are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_map(folder)
        self._open: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        file = self.files[key]
        if file not in self._open:
            self._open[file] = _open_file(self.folder / file)
        handle = self._open[file]
        try:
            return handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {file} does not hold {key} ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


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
    def reopened(
        cls, folder: Path, stored: Mapping[str, Tensor], *, trust_remote_code: bool = False
    ) -> CheckpointSource:
        """Returns a source with the model of a written folder, quantized or not, and tensors from elsewhere.

        Args:
            stored: checkpoint key -> tensor, packed weights given dequantized.
        """
        source = cls.__new__(cls)
        source._fill(folder, stored, structure_of(folder, trust_remote_code=trust_remote_code))
        return source

    def _fill(self, folder: Path, stored: Mapping[str, Tensor], model: nn.Module) -> None:
        self.folder: Path | None = folder
        self.stored = stored
        self._unfused = unfuse(model)
        self.model = self.original = self._unfused.model
        self._map = map_keys(stored, self._unfused)
        self._places = {
            part: (key, piece) for key, held in self._map.fused.items() for part, piece in held.parts.items()
        }

    def keys(self) -> dict[str, str | None]:
        """Returns checkpoint key -> parameter name within the model, or None."""
        return dict(self._map.names)

    def read(self, key: str) -> Tensor:
        """Returns the tensor stored under a checkpoint key, or the slice that a key stands for."""
        if key not in self._places:
            return self.stored[key]
        fused, piece = self._places[key]
        return piece.of(self.stored[fused]).contiguous()

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
    skipped = {"config.json", INDEX_NAME, PICKLED_INDEX_NAME, "quantization_config.json"}
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
    stored = _stored_config(folder, trust_remote_code=trust_remote_code)
    if stored.get("quantization_config"):
        method = stored["quantization_config"].get("quant_method")
        raise ConfigError(f"{folder} is quantized already ({method}). Give the original 16-bit model")
    return structure_of(folder, trust_remote_code=trust_remote_code)


def _stored_config(folder: Path, *, trust_remote_code: bool) -> dict[str, Any]:
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

    _stored_config(folder, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = auto_class(config)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns checkpoint key -> file name, safetensors before pickled weights."""
    for index_name, pattern in ((INDEX_NAME, "*.safetensors"), (PICKLED_INDEX_NAME, "pytorch_model*.bin")):
        index = folder / index_name
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"{index} is no index of weights: {error!r}") from error
            absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
            if absent:
                raise CheckpointError(f"{folder}: the index names files that are not there: {', '.join(absent)}")
            return weight_map
        files = sorted(folder.glob(pattern))
        if files:
            return {key: file.name for file in files for key in _open_file(file).keys()}
    raise CheckpointError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin)")


def _open_file(file: Path) -> Any:
    """Returns a safetensors handle, or the dictionary of a pickled file, memory-mapped and loaded with weights_only.

    Raises:
        CheckpointError: the file is damaged, or a pickle with more in it than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


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
