"""What a backend is: a declaration of what it can run, and one function that makes its kernel.

Capability is data, so selection, refusals and the shared tests need no code per backend.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import nn

from auto_round.inference.layer import LayerSpec, QuantizedLinear
from auto_round.registry import Registry
from auto_round.schemes import ActivationScheme


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to run quantized linear layers.

    Attributes:
        name, aliases: names for `AutoRoundConfig(backend=...)`.
        prepare: makes the kernel of a layer whose tensors are loaded and settled: a module called as
            `kernel(layer, x)`. What it keeps must be non-persistent buffers. Optional packages are imported inside.
        layouts, devices, bits, sym, dtypes: what it accepts, see `LayerSpec`.
        data_types: accepted `scheme.data_type` values.
        activations: accepted `scheme.activation` values, where None stands for 16 bits; None: all that
            `quantize_activation` knows.
        group_sizes: accepted `scheme.group_size` values, -1 meaning one scale per row; None: all.
        partial_groups: whether the last group of a row may be shorter.
        act_order: whether groups may be out of order (GPTQ's desc_act).
        in_multiple, out_multiple: what in and out features must be multiples of.
        requires: packages that must be installed, as they are imported.
        pip: what to give to `pip install` for them, if that has another name.
        brings: what installing them would bring, for people.
        refuses: what the other fields cannot say: returns why a layer is not accepted, or None.
        priority: the highest that accepts a layer is chosen by "auto"; below 0 a backend has to be named.
        priority_here: the priority on this machine, where that depends on its processor.
    """

    name: str
    prepare: Callable[[QuantizedLinear], nn.Module]
    layouts: frozenset[str]
    devices: frozenset[str]
    bits: frozenset[int]
    sym: frozenset[bool]
    dtypes: frozenset[torch.dtype]
    priority: int
    aliases: tuple[str, ...] = ()
    data_types: frozenset[str] = frozenset({"int"})
    activations: frozenset[ActivationScheme | None] | None = frozenset({None})
    group_sizes: frozenset[int] | None = None
    partial_groups: bool = True
    act_order: bool = True
    in_multiple: int = 1
    out_multiple: int = 1
    requires: tuple[str, ...] = ()
    pip: str = ""
    brings: str = ""
    priority_here: Callable[[], int] | None = None
    refuses: Callable[[LayerSpec], str | None] | None = None

    def rank(self) -> int:
        """Returns the priority on this machine."""
        return self.priority if self.priority_here is None else self.priority_here()

    def missing(self) -> list[str]:
        """Returns the required packages that are not installed."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]

    def packages(self) -> str:
        """Returns what is required, as `pip install` knows it."""
        return self.pip or " ".join(self.requires)


BACKENDS: Registry[Backend] = Registry("backend")


def register_backend(backend: Backend) -> Backend:
    """Enters a backend under its name and aliases, and returns it."""
    return BACKENDS.register(backend.name, *backend.aliases)(backend)


def why_not(backend: Backend, spec: LayerSpec) -> str | None:
    """Returns every reason why `backend` cannot run the layer, joined by "; ", or None if it can."""
    scheme = spec.scheme
    checks = [
        ("layout", spec.layout, backend.layouts),
        ("device", spec.device, backend.devices),
        ("bits", scheme.bits, backend.bits),
        ("sym", scheme.sym, backend.sym),
        ("data_type", scheme.data_type, backend.data_types),
        ("dtype", spec.dtype, backend.dtypes),
    ]
    if backend.activations is not None:
        checks.append(("activations", scheme.activation, backend.activations))
    if backend.group_sizes is not None:
        checks.append(("group_size", scheme.group_size, backend.group_sizes))
    reasons = [f"{what}={_text(value)} (only {_listed(known)})" for what, value, known in checks if value not in known]
    if not backend.partial_groups and spec.in_features % spec.group_size:
        reasons.append(f"in_features={spec.in_features} is no multiple of group_size={spec.group_size}")
    if not backend.act_order and spec.act_order:
        reasons.append("groups out of order (desc_act=true)")
    if spec.in_features % backend.in_multiple:
        reasons.append(f"in_features={spec.in_features} is no multiple of {backend.in_multiple}")
    if spec.out_features % backend.out_multiple:
        reasons.append(f"out_features={spec.out_features} is no multiple of {backend.out_multiple}")
    reason = backend.refuses(spec) if backend.refuses is not None else None
    if reason is not None:
        reasons.append(reason)
    missing = backend.missing()
    if missing:
        reasons.append(f"needs {', '.join(missing)} (pip install {backend.packages()})")
    return "; ".join(reasons) or None


def why_not_this_gpu(spec: LayerSpec, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Returns why kernels for NVIDIA GPUs cannot run here; None where no GPU is seen.

    Args:
        capability: the least compute capability; 8.0 has bfloat16 tensor cores.
    """
    if spec.device == "cuda" and torch.cuda.is_available():
        if torch.version.hip or torch.cuda.get_device_capability() < capability:
            return f"needs an NVIDIA GPU of compute capability {'.'.join(map(str, capability))} or later"
    return None


def _text(value: object) -> str:
    return "16-bit" if value is None else str(value).removeprefix("torch.")


def _listed(values: frozenset) -> str:
    return ", ".join(sorted(map(_text, values)))
