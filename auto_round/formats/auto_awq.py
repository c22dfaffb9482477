"""The auto_awq format: AutoAWQ's "gemm" checkpoints, as Transformers with gptqmodel, GPTQModel and vLLM load them.

One width and one group size for all layers. Layers in 16 bits are listed in `modules_to_not_convert` (Transformers,
vLLM) and again in `dynamic`, which is where GPTQModel looks. Zero points of symmetric layers are stored too, so
symmetric and asymmetric layers can stand side by side under zero_point=true.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from auto_round import __version__
from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container, refusals
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.formats.layer_rules import skip_rules, skipped_modules
from auto_round.formats.run_record import run_record
from auto_round.layouts import LAYOUTS, Layout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

ONE_SCHEME = Capability(
    schemes=(SchemeSet(bits=frozenset({4}), group_sizes=frozenset({32, 64, 128})),),
    loads_in="Transformers with gptqmodel; GPTQModel; vLLM; mlx-lm",
    uniform=("bits", "group_size"),
    head=False,
    transposed=False,
    in_multiple=32,
    out_multiple=32,
)
CONTAINER = Container(bias_dtype="float16")


@dataclasses.dataclass(frozen=True, slots=True)
class AutoAwqFormat:
    """Checkpoints with quant_method "awq", version "gemm"."""

    name: str = "auto_awq"
    summary: str = "AWQ checkpoint"
    capability: Capability = ONE_SCHEME
    container: Container = CONTAINER

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns the AWQ layout."""
        return LAYOUTS["awq"]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what AWQ's one scheme for all layers cannot hold."""
        return refusals(self, plan)

    def warnings(self, plan: Plan) -> list[str]:  # noqa: ARG002
        """Returns nothing: all engines read the same."""
        return []

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:
        """Returns the keys of AutoAWQ, and the options of the run that are not defaults."""
        schemes = [entry.scheme for entry in plan.quantized().values()]
        sym = all(scheme.sym for scheme in schemes)
        entries: dict[str, Any] = {"bits": 4, "data_type": "int", "group_size": schemes[0].group_size, "sym": sym}
        entries |= run_record(plan, config)
        entries |= {"to_quant_block_names": ",".join(plan.structure.block_lists), "autoround_version": __version__}
        entries |= {"provider": "auto-round", "quant_method": "awq", "zero_point": not sym, "version": "gemm"}
        entries["modules_to_not_convert"] = skipped_modules(plan)
        if rules := skip_rules(plan):
            entries["dynamic"] = rules
        return entries


EXPORTERS.register("auto_awq")(AutoAwqFormat())
