"""The auto_round format: one config that Transformers, vLLM and SGLang read, above tensors of several layouts.

For weights that are no integers, and for quantized activations, these are the tensors of compressed-tensors. For
integer weights `auto_round` picks the layout that serving engines load: `auto_round:auto_awq` when every layer is 4-bit
asymmetric, else `auto_round:auto_gptq`. The latter stores zero points minus one; asymmetric grids here start at zero
point 1, so 2, 3 and 8 bits asymmetric are exact in it too and need no layout that only Transformers reads.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from auto_round import __version__
from auto_round.config import CalibConfig, RunConfig
from auto_round.formats.base import EXPORTERS, Container, activation_fields, differing_fields, head_entry, refusals
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.formats.layer_rules import other_modules
from auto_round.formats.llm_compressor import COMPRESSED_TENSORS, compressed_refusals
from auto_round.formats.run_record import run_record
from auto_round.layouts import LAYOUTS, Layout
from auto_round.layouts.by_scheme import compressed_layout
from auto_round.layouts.gptq import GptqLayout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

GPTQ, AWQ, GPTQ_ZP = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel"
COMPRESSED = "auto_round:llm_compressor"
# The third one has g_idx, as checkpoints of GPTQModel do.
LAYOUT_OF_PACKING: dict[str, Layout] = {
    GPTQ: LAYOUTS["gptq"],
    AWQ: LAYOUTS["awq"],
    GPTQ_ZP: GptqLayout("gptq_zp", zero_offset=0, group_index=True),
}
CONTAINER = Container(bias_dtype="float16")


@dataclasses.dataclass(frozen=True, slots=True)
class AutoRoundFormat:
    """Checkpoints with quant_method "auto-round".

    Attributes:
        packing: the packing_format, or None to choose by scheme.
    """

    name: str
    summary: str
    capability: Capability
    packing: str | None = None
    container: Container = CONTAINER

    def packing_for(self, plan: Plan) -> str:
        """Returns the packing_format of the whole checkpoint."""
        if self.packing is not None:
            return self.packing
        schemes = [entry.scheme for entry in plan.quantized().values()]
        if any(scheme.data_type != "int" or scheme.quantizes_activations for scheme in schemes):
            return COMPRESSED
        if all(scheme.bits == 4 and not scheme.sym for scheme in schemes):
            return AWQ
        return GPTQ

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:
        """Returns the layout of the packing_format."""
        packing = self.packing_for(plan)
        return compressed_layout(scheme) if packing == COMPRESSED else LAYOUT_OF_PACKING[packing]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what the layout cannot hold."""
        return (
            compressed_refusals(plan, self.capability) if self.packing_for(plan) == COMPRESSED else refusals(self, plan)
        )

    def warnings(self, plan: Plan) -> list[str]:  # noqa: ARG002
        """Returns nothing: all engines read the same."""
        return []

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:
        """Returns the keys that vLLM, SGLang and Transformers read, and those of the tuning that are not defaults."""
        base = _said_of_all(plan.base)
        entries: dict[str, Any] = {
            "bits": base.bits if base.is_quantized else 4,
            "data_type": base.data_type,
            "group_size": base.group_size,
            "sym": base.sym,
            **activation_fields(base),
        }
        entries |= run_record(plan, config)
        dataset = config.calib.dataset
        if isinstance(dataset, str) and dataset != CalibConfig().dataset and config.tune.needs_calibration:
            entries["dataset"] = dataset
        entries["autoround_version"] = __version__
        entries["block_name_to_quantize"] = ",".join(plan.structure.block_lists)
        entries["quant_method"] = "auto-round"
        entries["packing_format"] = self.packing_for(plan)
        extra = {
            entry.layer.name: fields
            for entry in plan.entries
            if entry.layer.block is not None and (fields := differing_fields(entry.scheme, base))
        }
        # Routers and experts that stay fused are no linear layers here, but engines make them ones.
        extra |= {name: {"bits": 16} for name in other_modules(plan)}
        # Layers below a module are reached by an expression only.
        extra |= {rf"^{re.escape(name)}\..*": {"bits": 16} for name in plan.structure.extra_modules}
        extra |= head_entry(plan)
        return entries | ({"extra_config": extra} if extra else {})


def _said_of_all(base: QuantizationScheme) -> QuantizationScheme:
    """Returns the scheme that the top of the config describes; layers say what differs from it.

    Transformers' AutoRoundConfig fails on blocks and on one scale per tensor there, and reads no further.
    """
    if isinstance(base.group_size, tuple):
        return base.replace(group_size=base.group_size[1])
    return base.replace(group_size=-1) if base.group_size == 0 else base


INTEGERS = Capability(
    schemes=(SchemeSet(),),
    loads_in="Transformers; vLLM, SGLang where they have a kernel",
    outside=True,
    partial_groups=True,
)
FOUR_BITS = dataclasses.replace(INTEGERS, schemes=(SchemeSet(bits=frozenset({4})),))
HERE_ONLY = dataclasses.replace(INTEGERS, loads_in="Transformers")


def _register(name: str, summary: str, capability: Capability, packing: str | None) -> None:
    EXPORTERS.register(name)(AutoRoundFormat(name, summary, capability, packing))


EVERYTHING = dataclasses.replace(INTEGERS, schemes=(*INTEGERS.schemes, *COMPRESSED_TENSORS.schemes[1:]))
HERE_AND_VLLM = dataclasses.replace(
    COMPRESSED_TENSORS,
    loads_in="Transformers; vLLM, SGLang where they have a kernel",
    cache_scales=False,
    fused_experts=True,
)

_register("auto_round", "this package's own format, its tensors chosen by scheme", EVERYTHING, None)
_register("auto_round:auto_gptq", "the same, GPTQ tensors (zero points stored minus one)", INTEGERS, GPTQ)
_register("auto_round:auto_awq", "the same, AWQ tensors", FOUR_BITS, AWQ)
_register(COMPRESSED, "the same, tensors of compressed-tensors", HERE_AND_VLLM, COMPRESSED)
_register("auto_round:gptqmodel", "the same, GPTQ tensors with zero points as they are", HERE_ONLY, GPTQ_ZP)
