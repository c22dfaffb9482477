"""How the weights of one run are written in one format: layout, dtype, and names of each tensor.

Shared by the writer and by the check that reopens what was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from auto_round.checkpoint import WeightSource
from auto_round.formats.base import Exporter, copied_dtype
from auto_round.layouts import Layout
from auto_round.models.base import ROUTER, LinearInfo
from auto_round.plan import Plan, PlanEntry
from auto_round.schemes import QuantizationScheme


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The layouts of a plan's weights in one format, found once: models with many experts have many weights.

    Attributes:
        entries: parameter name -> entry, of quantized weights.
        layouts: of each scheme.
    """

    exporter: Exporter
    plan: Plan
    entries: Mapping[str, PlanEntry]
    layouts: Mapping[QuantizationScheme, Layout | None]

    @classmethod
    def of(cls, exporter: Exporter, plan: Plan) -> Packing:
        """Returns the layouts of a plan in a format."""
        entries = plan.quantized()
        schemes = dict.fromkeys(entry.scheme for entry in entries.values())
        return cls(exporter, plan, entries, {scheme: exporter.layout_for(scheme, plan) for scheme in schemes})

    def layout(self, name: str) -> Layout | None:
        """Returns the layout of a quantized weight, or None if its dequantized values are written."""
        return self.layouts[self.entries[name].scheme]

    def is_packed(self, name: str | None) -> bool:
        """Whether a parameter is written in other tensors than its own."""
        return name in self.entries and self.layout(name or "") is not None

    def copied_dtype(self, name: str | None, asked: str | None) -> str | None:
        """Returns the dtype in which a tensor is written that is not packed, see `base.copied_dtype`."""
        return copied_dtype(self.exporter, self.entries, name, asked)


class Joints:
    """Puts together again what a source lists by slices of a fused tensor, where no slice is packed.

    So whatever loads the original also loads its experts when they stay in 16 bits or are written dequantized.

    Attributes:
        keys: key of a slice -> key of the fused tensor that is written in its place.
    """

    def __init__(self, source: WeightSource, packing: Packing) -> None:
        names = source.keys()
        self.source = source
        self.parts = {
            fused: parts
            for fused, parts in source.fused().items()
            if not any(packing.is_packed(names[part]) or _is_of_packed(names[part], packing) for part in parts)
        }
        self.keys = {part: fused for fused, parts in self.parts.items() for part in parts}
        self._found: dict[str, dict[str, Tensor]] = {}

    def joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors to write: slices are kept back until all of their fused tensor have come."""
        ready = {}
        for key, tensor in tensors.items():
            fused = self.keys.get(key)
            if fused is None:
                ready[key] = tensor
                continue
            found = self._found.setdefault(fused, {})
            found[key] = tensor
            if len(found) == len(self.parts[fused]):
                ready[fused] = self.source.join(fused, self._found.pop(fused))
        return ready


def _is_of_packed(name: str | None, packing: Packing) -> bool:
    """Whether a parameter is the bias of a packed weight; it then goes by its layer."""
    return name is not None and name.endswith(".bias") and packing.is_packed(name.removesuffix("bias") + "weight")


def in_stored_names(plan: Plan, keys: Mapping[str, str | None]) -> Plan:
    """Returns a plan whose experts and routers have the names within their blocks that the checkpoint gives them.

    Engines know these (Mixtral's `block_sparse_moe.experts.0.w1`). Whatever else the model calls otherwise than the
    checkpoint, as vision-language models do their blocks, keeps the model's name: loaders map it.

    Args:
        keys: checkpoint key -> parameter name.
    """
    stored = {name: key for key, name in keys.items() if name is not None and key != name}
    routers = {layer.parameter for layer in plan.structure.linears if layer.kept == ROUTER}
    routers |= {name for name, reason in plan.structure.other_weights.items() if reason == ROUTER}
    routed = {name for name in stored if ".experts." in name or name in routers}
    renamed = {}
    for block in plan.structure.blocks:
        own = _stored_module(block, stored)
        for name, key in stored.items():
            if name in routed and name.startswith(block + ".") and key.startswith(own + "."):
                renamed[name] = block + key.removeprefix(own)
    renamed = {name: key for name, key in renamed.items() if name != key}
    if not renamed:
        return plan

    def of(layer: LinearInfo) -> LinearInfo:
        parameter = f"{layer.name}.weight"
        return dataclasses.replace(layer, name=renamed.get(parameter, parameter).removesuffix(".weight"))

    entries = tuple(dataclasses.replace(entry, layer=of(entry.layer)) for entry in plan.entries)
    structure = dataclasses.replace(
        plan.structure,
        linears=tuple(of(layer) for layer in plan.structure.linears),
        other_weights={renamed.get(name, name): reason for name, reason in plan.structure.other_weights.items()},
    )
    return dataclasses.replace(plan, entries=entries, structure=structure)


def _stored_module(module: str, stored: Mapping[str, str]) -> str:
    """Returns the name of a module in the checkpoint: what stands there before the tail of one of its parameters."""
    for name, key in stored.items():
        tail = name.removeprefix(module)
        if name.startswith(module + ".") and key.endswith(tail):
            return key.removesuffix(tail)
    return module
