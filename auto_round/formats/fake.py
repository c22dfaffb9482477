"""The fake format: a plain 16-bit checkpoint whose weights are the dequantized ones. For evaluation anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS
from auto_round.layouts import Layout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme


@dataclasses.dataclass(frozen=True, slots=True)
class FakeFormat:
    """Dequantized weights; holds everything."""

    name: str = "fake"
    summary: str = "plain checkpoint of dequantized weights; loads anywhere, saves no memory"

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns None: weights are written dequantized."""
        return None

    def refusals(self, plan: Plan) -> list[str]:  # noqa: ARG002
        """Returns nothing: every plan fits."""
        return []

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any] | None:  # noqa: ARG002
        """Returns None: there is nothing for a loader to know."""
        return None


EXPORTERS.register("fake", "qdq")(FakeFormat())
