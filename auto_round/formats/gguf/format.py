"""The formats gguf:q4_k_m and so on: one file that llama.cpp, Ollama, LM Studio and others load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from auto_round.checkpoint import WeightSource
from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container, refusals
from auto_round.formats.capability import NO_CACHE_SCALES, Capability, SchemeSet
from auto_round.formats.gguf.check import check_gguf
from auto_round.formats.gguf.mixes import MIXES
from auto_round.formats.gguf.mmproj import check_mmproj, write_mmproj
from auto_round.formats.gguf.prescribe import prescribe
from auto_round.formats.gguf.writer import write_gguf
from auto_round.layouts import LAYOUTS, Layout
from auto_round.layouts.gguf_blocks import block_type_of
from auto_round.models.base import ModelStructure
from auto_round.plan import Plan, Prescription
from auto_round.schemes import QuantizationScheme
from auto_round.store import RunStore

CONTAINER = Container(config_keys=(), config_files=())
BLOCK_TYPES = Capability(
    schemes=(
        SchemeSet(bits=frozenset({4, 5, 8}), sym=frozenset({True}), group_sizes=frozenset({32}), per_row=False),
        SchemeSet(
            data_types=frozenset({"int_float_zp"}),
            bits=frozenset({4, 5}),
            sym=frozenset({False}),
            group_sizes=frozenset({32}),
            per_row=False,
        ),
        SchemeSet(
            data_types=frozenset({"int_dq"}),
            bits=frozenset({2, 3, 4, 5, 6}),
            group_sizes=frozenset({16, 32}),
            per_row=False,
        ),
    ),
    loads_in="llama.cpp, Ollama, LM Studio; Transformers (gguf_file=)",
    loads_here=False,
    outside=True,
    transposed=False,
)


@dataclasses.dataclass(frozen=True, slots=True)
class GgufFormat:
    """GGUF files of one mixture.

    Attributes:
        mix: key of MIXES.
    """

    mix: str
    capability: Capability = BLOCK_TYPES
    container: Container = CONTAINER

    @property
    def name(self) -> str:
        """What users ask for."""
        return f"gguf:{self.mix}"

    @property
    def summary(self) -> str:
        """One line for the table of formats."""
        return f"one GGUF file, {MIXES[self.mix][0]} blocks" + (" and better ones" if "_k" in self.mix else "")

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns the layout of the block type that a scheme is."""
        return LAYOUTS[f"gguf_{block_type_of(scheme).lower()}"]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns why a plan cannot be held: only one made for this format is."""
        if plan.prescribed_by != self.name:
            return [
                f"decides by itself what each weight becomes, and this run was planned without it. Give --format "
                f"{self.name} from the start (format='{self.name}' to AutoRound)"
            ]
        found = refusals(self, plan) + [
            f"stores the experts of a layer in one tensor of one type, but {name} differ. Name them all in layer_config"
            for name in _mixed_experts(plan)
        ]
        return found + ([NO_CACHE_SCALES] if plan.has_cache_scales and NO_CACHE_SCALES not in found else [])

    def warnings(self, plan: Plan) -> list[str]:  # noqa: ARG002
        """Returns nothing: llama.cpp and what is built on it read all types."""
        return []

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any] | None:  # noqa: ARG002
        """Returns None: a file has no config.json."""
        return None

    def prescription(
        self, structure: ModelStructure, source: WeightSource, tokenizer: Any, config: RunConfig
    ) -> Prescription:
        """Returns what the mixture makes of each weight."""
        return prescribe(self.mix, structure, source, tokenizer, config)

    def write(
        self, folder: Path, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig, tokenizer: Any
    ) -> None:
        """Writes the file, and that of the vision tower beside it where there is one."""
        write_gguf(folder, self.mix, plan=plan, source=source, store=store, config=config, tokenizer=tokenizer)
        write_mmproj(folder, self.mix, source)

    def check_written(
        self, folder: Path, *, plan: Plan, source: WeightSource, store: RunStore, config: RunConfig
    ) -> tuple[list[str], str]:
        """Reopens the file and compares it with what was quantized."""
        problems, line = check_gguf(folder, self.mix, plan=plan, source=source, store=store, config=config)
        return problems + check_mmproj(folder, self.mix, source), line


def _mixed_experts(plan: Plan) -> list[str]:
    """Returns the names, without a number, of experts' layers that have several schemes."""
    schemes: dict[str, set[QuantizationScheme]] = {}
    for entry in plan.entries:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", entry.layer.name)
        schemes.setdefault(name, set()).add(entry.scheme)
    return [name for name, found in schemes.items() if len(found) > 1]


for _mix in MIXES:
    EXPORTERS.register(f"gguf:{_mix}")(GgufFormat(_mix))
