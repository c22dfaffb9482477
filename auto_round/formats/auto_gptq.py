"""The auto_gptq format: checkpoints of AutoGPTQ's making, as GPTQModel, Transformers with optimum, and vLLM load them.

Zero points are stored minus one ("gptq"), as everyone reads them. If the config says sym=false they are stored as they
are ("gptq_v2"): GPTQModel loads asymmetric checkpoints of the first kind only from its own quantizer, because there a
zero point of 0 wraps around. `dynamic` tells GPTQModel and vLLM what differs between layers, and
`modules_in_block_to_quantize` tells optimum which layers are quantized; optimum knows one scheme for all of them.
Source: gptqmodel 7.6 models/loader.py, optimum 2.3 gptq/quantizer.py, vLLM layers/quantization/auto_gptq.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from auto_round import __version__
from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container, refusals
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.formats.layer_rules import dynamic_rules, most_common_scheme, quantized_in_blocks
from auto_round.formats.run_record import run_record
from auto_round.layouts import Layout
from auto_round.layouts.gptq import GptqLayout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

FIELDS = ("bits", "group_size", "sym")
MINUS_ONE = GptqLayout("gptq", zero_offset=1, group_index=True)
AS_IT_IS = GptqLayout("gptq_zp", zero_offset=0, group_index=True)
# Block lists that optimum finds by itself. Source: optimum/gptq/constants.py.
KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")

GPTQMODEL_KERNELS = Capability(
    schemes=(SchemeSet(bits=frozenset({2, 3, 4, 8}), group_sizes=frozenset({32, 64, 128, 256, 512, 1024})),),
    loads_in="GPTQModel; Transformers with optimum (one scheme); vLLM (4, 8 bits sym)",
    in_multiple=32,
    out_multiple=32,
)
CONTAINER = Container(config_files=("quantization_config.json", "quantize_config.json"), bias_dtype="float16")


@dataclasses.dataclass(frozen=True, slots=True)
class AutoGptqFormat:
    """Checkpoints with quant_method "gptq"."""

    name: str = "auto_gptq"
    summary: str = "GPTQ checkpoint; 4 bits asymmetric serves better as auto_awq"
    capability: Capability = GPTQMODEL_KERNELS
    container: Container = CONTAINER

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns the layout of all layers, chosen by the symmetry that the config states."""
        return MINUS_ONE if most_common_scheme(plan, FIELDS).sym else AS_IT_IS

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what the engines' kernels cannot run."""
        return refusals(self, plan)

    def warnings(self, plan: Plan) -> list[str]:
        """Returns which of the engines cannot load this plan."""
        base = most_common_scheme(plan, FIELDS)
        schemes = [entry.scheme for entry in plan.quantized().values()]
        found = []
        if any(rule.startswith("+:") for rule in dynamic_rules(plan, base)):
            found.append("layers differ in bits, group size or symmetry: Transformers cannot load this, GPTQModel can")
        if plan.outside():
            found.append(
                "the output layer is quantized: Transformers would leave it random, GPTQModel and vLLM load it"
            )
        if any(scheme.bits not in (4, 8) or not scheme.sym for scheme in schemes):
            four = all(scheme.bits == 4 for scheme in schemes)
            found.append(
                "vLLM takes GPTQ checkpoints of 4 and 8 bits symmetric only. Use --format "
                + ("auto_awq" if four else "auto_round")
                + " for it"
            )
        return found

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:
        """Returns the keys of AutoGPTQ and GPTQModel, and the options of the run that are not defaults."""
        base = most_common_scheme(plan, FIELDS)
        entries: dict[str, Any] = {"bits": base.bits, "data_type": "int", "group_size": base.group_size}
        entries |= {"sym": base.sym, **run_record(plan, config), "autoround_version": __version__}
        entries |= {"lm_head": bool(plan.outside()), "provider": "auto-round", "quant_method": "gptq"}
        entries |= {"desc_act": False, "true_sequential": False, "damp_percent": 0.01}
        if not base.sym:
            entries["checkpoint_format"] = "gptq_v2"
        # Loaders that know no list take every numbered module for a block, those of a vision tower too.
        elsewhere = any(re.search(r"\.\d+\.", e.layer.name) for e in plan.entries if e.layer.block is None)
        if elsewhere or plan.structure.block_lists[0] not in KNOWN_BLOCKS:
            entries["block_name_to_quantize"] = plan.structure.block_lists[0]
        if rules := dynamic_rules(plan, base):
            entries["dynamic"] = rules
        if (modules := quantized_in_blocks(plan)) is not None:
            entries["modules_in_block_to_quantize"] = [modules]
        return entries


EXPORTERS.register("auto_gptq")(AutoGptqFormat())
