"""The fake format: a plain 16-bit checkpoint whose weights are the dequantized ones. For evaluation anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.layouts import Layout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

PLAIN = Container()
EVERYTHING = Capability(
    schemes=(SchemeSet(data_types=None, bits=None, sym=None, per_tensor=True, act_bits=None),),
    loads_in="whatever loads the original",
    outside=True,
    partial_groups=True,
)


@dataclasses.dataclass(frozen=True, slots=True)
class FakeFormat:
    """Dequantized weights; holds everything."""

    name: str = "fake"
    summary: str = "plain checkpoint of dequantized weights, for evaluation; saves no memory"
    capability: Capability = EVERYTHING
    container: Container = PLAIN

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns None: weights are written dequantized."""
        return None

    def refusals(self, plan: Plan) -> list[str]:
        """Returns only a reason against scales of a cache: every plan for weights fits."""
        return self.capability.refusals(plan)

    def warnings(self, plan: Plan) -> list[str]:  # noqa: ARG002
        """Returns nothing: all engines read the same."""
        return []

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any] | None:  # noqa: ARG002
        """Returns None: there is nothing for a loader to know."""
        return None


EXPORTERS.register("fake", "qdq")(FakeFormat())
