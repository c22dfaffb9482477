"""The three functions Transformers calls to load an auto-round checkpoint (its quantizers/quantizer_auto_round.py).

`convert_hf_model` swaps linear layers for `QuantizedLinear` while the model is on the meta device, Transformers fills
their buffers by name, `post_init` makes the kernels.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auto_round.conversion import model_conversions
from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.inference.config import CheckpointConfig, read_config
from auto_round.inference.experts import load_experts_by_name, unfuse_quantized_experts
from auto_round.inference.input_quantization import why_no_range
from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.inference.packing import DENSE
from auto_round.inference.select import AUTO, hint, kernel_for, select_backends
from auto_round.layouts import LAYOUTS
from auto_round.models.experts import fused_experts

logger = logging.getLogger(__name__)

ACCELERATORS = ("cuda", "xpu", "hpu", "mps")


def infer_target_device(device_map: Any = None) -> str:
    """Returns the type of the device that layers will run on: "cpu", "cuda" ...

    Args:
        device_map: as given to `from_pretrained`: None, a device, its name or number, "auto" and the like, or a
            dictionary of them; in a dictionary any accelerator comes before "cpu" and "disk".
    """
    if device_map is None:
        return "cpu"
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    types = [_device_type(place) for place in places]
    return next((kind for kind in types if kind != "cpu"), "cpu")


def convert_hf_model(model: nn.Module, target_device: str = "cpu") -> tuple[nn.Module, list[str]]:
    """Swaps the quantized linear layers of a model whose weights are not loaded yet, in place.

    Args:
        model: a Transformers model with `config.quantization_config`.
        target_device: what `infer_target_device` returned.
    Returns:
        the model, and the names of the backends chosen for it, to be passed to `post_init`.
    Raises:
        UnsupportedError: something in the checkpoint, or for the named backend, cannot be run; with all reasons.
        ConfigError: an unknown backend.
    """
    renamings = _renamings(model)
    config = read_config(model.config.quantization_config).renamed(_by(renamings))
    stored_name = _by([renaming.reverse_transform() for renaming in reversed(renamings)])
    if unfuse_quantized_experts(model, config, stored_name):
        load_experts_by_name(model)
    specs = _layer_specs(model, config, target_device, stored_name)
    _check(model, specs, config)
    backends = select_backends(specs, config.backend)
    better = hint(specs, backends) if config.backend == AUTO else None
    if better:
        logger.warning(better)
    # For layers that are moved or cast later.
    choose_kernel = functools.partial(kernel_for, name=config.backend)
    for spec in specs:
        device = model.get_submodule(spec.name).weight.device
        layer = QuantizedLinear(spec, backends[spec.name].prepare, device, choose_kernel)
        model.set_submodule(spec.name, layer)
        # Transformers initialises what it takes for missing; some classes (SigLIP) do so to the weights of layers in
        # them, which are gone. All that such a module holds is in the checkpoint.
        model.get_submodule(spec.name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
    counts = Counter(backend.name for backend in backends.values())
    return model, [name for name, _ in counts.most_common()]


def post_init(model: nn.Module, used_backends: Sequence[str]) -> None:  # noqa: ARG001
    """Makes the kernels, after the tensors are loaded.

    Args:
        model: what `convert_hf_model` returned.
        used_backends: its second result. Each layer knows its own kernel, so nothing is read from it.
    Raises:
        CheckpointError: tensors of quantized layers are missing, or a group index is invalid.
        UnsupportedError: the tensors of a quantized layer were offloaded.
    """
    _check_loaded(model)
    for layer in _quantized_layers(model):
        if layer.device.type == "meta":
            raise UnsupportedError(f"{layer.spec.name} was offloaded to disk; load with offload_buffers=False")
        if layer.spec.group_index and _is_loaded(layer.qweight) and not _is_loaded(layer.g_idx):
            # Else memory that was another layer's index before would be taken for the one of this layer.
            layer.g_idx.fill_(-1)
        layer.settle()
        layer.prepare()


def _device_type(place: Any) -> str:
    if isinstance(place, int) and not isinstance(place, bool):
        return _accelerator("cuda")
    kind = str(place).partition(":")[0]
    if kind in ("cpu", "disk", "meta"):
        return "cpu"
    if kind in ACCELERATORS:
        return kind
    return _accelerator("cpu")


def _accelerator(otherwise: str) -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else otherwise


def _layer_specs(
    model: nn.Module, config: CheckpointConfig, device: str, stored_name: Callable[[str], str]
) -> list[LayerSpec]:
    specs = []
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        plan = config.resolve(name, stored_name(name))
        if plan is None:
            continue
        shape = module.weight.shape
        out_features, in_features = reversed(shape) if isinstance(module, Conv1D) else shape
        specs.append(
            LayerSpec(
                name=name,
                in_features=in_features,
                out_features=out_features,
                scheme=plan[0],
                layout=plan[1],
                dtype=module.weight.dtype,
                device=device,
                bias=module.bias is not None,
                group_index=config.group_index,
                act_order=config.act_order,
            )
        )
    return specs


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer. Subclasses that do more (routers of some MoE models) are not."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or type(module) is Conv1D


def _check(model: nn.Module, specs: Sequence[LayerSpec], config: CheckpointConfig) -> None:
    """Raises UnsupportedError, with every reason, if the layers cannot be what the checkpoint holds."""
    problems: dict[str, list[str]] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for spec in specs:
        refused = None if spec.layout == DENSE else LAYOUTS[spec.layout].refuses(spec.scheme, spec.shape)
        reason = refused or why_no_range(spec)
        if reason:
            problems.setdefault(f"the layout {spec.layout} cannot hold {reason}", []).append(spec.name)
        if f"{spec.name}.weight" in tied:
            problems.setdefault("a weight that is tied to the embedding cannot be quantized", []).append(spec.name)
    for name in _fused_experts(model):
        if config.resolve(name) is not None:
            problems.setdefault(
                "quantized experts, which this model fuses in its own way, cannot be loaded", []
            ).append(name)
    if problems:
        lines = [f"{reason} ({len(names)} modules, e.g. {names[0]})" for reason, names in problems.items()]
        raise UnsupportedError("this checkpoint cannot be loaded: " + "; ".join(lines))
    if not specs:
        names = [name for name, module in model.named_modules() if _is_linear(module)]
        raise UnsupportedError(
            f"no linear layer of the model is quantized according to its quantization_config (blocks: {config.blocks}; "
            f"layers: {', '.join(names[:2]) or 'none'} ...). Correct block_name_to_quantize."
        )


def _fused_experts(model: nn.Module) -> Iterator[str]:
    """Yields modules that hold the weights of all experts in one parameter each, in a way that is not known."""
    known = fused_experts(model)
    for name, module in model.named_modules():
        if name in known:
            continue
        if name.rpartition(".")[2] == "experts" and any(p.ndim == 3 for p in module.parameters(recurse=False)):
            yield name


def _quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def _is_loaded(tensor: Tensor) -> bool:
    """Whether Transformers marked a tensor as filled from the checkpoint."""
    return hasattr(tensor, "_is_hf_initialized")


def _check_loaded(model: nn.Module) -> None:
    """Raises CheckpointError if Transformers left tensors uninitialised.

    It marks tensors it has loaded and only warns of others. Without any mark (another loader), or when accelerate has
    spread the model over devices and replaced its tensors, nothing is known and nothing is checked.
    """
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        return
    loaded = {
        f"{layer.spec.name}.{name}": _is_loaded(tensor)
        for layer in _quantized_layers(model)
        for name, tensor in layer.named_buffers(recurse=False)
        if name != "g_idx"
    }
    missing = [name for name, is_loaded in loaded.items() if not is_loaded]
    if missing and len(missing) < len(loaded):
        raise CheckpointError(
            f"{len(missing)} tensors of quantized layers are not in the checkpoint, e.g. {missing[0]}. If these layers "
            "are not quantized, the quantization_config must say so (extra_config with bits 16)."
        )


def _renamings(model: nn.Module) -> list[Any]:
    """Returns the renamings by which Transformers turns a name in a checkpoint into the name in this model."""
    try:
        return model_conversions(model)[0]
    except ImportError:  # these are internals of Transformers 5
        return []


def _by(renamings: Sequence[Any]) -> Callable[[str], str]:
    """Returns the function that applies renamings, which are written for names of tensors, to a name."""

    def rename(name: str) -> str:
        tensor = f"{name}.weight"
        for renaming in renamings:
            tensor, _ = renaming.rename_source_key(tensor)
        return tensor.removesuffix(".weight")

    return rename
