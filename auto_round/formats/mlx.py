"""The mlx format: checkpoints for Apple's MLX, as mlx-lm loads them.

Scales and biases are written in the scheme's scale dtype, float16 unless asked otherwise, so that dequantized weights
are exact (symmetric) or off by at most zero_point / 2**11 steps (asymmetric). MLX computes in the wider of the dtypes
of activations and scales: a bfloat16 model with float16 scales runs in float32. Scales that are tuned in bfloat16
(--scale_dtype bf16) keep it in bfloat16, --model_dtype fp16 in float16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container, refusals
from auto_round.formats.capability import Capability, SchemeSet
from auto_round.formats.layer_rules import most_common_scheme
from auto_round.layouts import LAYOUTS, Layout
from auto_round.layouts.mlx import BITS, GROUP_SIZES
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

FIELDS = ("bits", "group_size")
MLX_KERNELS = Capability(
    schemes=(SchemeSet(bits=frozenset(BITS), group_sizes=frozenset(GROUP_SIZES), per_row=False),),
    loads_in="mlx-lm",
    loads_here=False,
    outside=True,
    transposed=False,
)
CONTAINER = Container(config_keys=("quantization", "quantization_config"), config_files=(), bias_dtype="float16")


@dataclasses.dataclass(frozen=True, slots=True)
class MlxFormat:
    """Checkpoints with `quantization` in config.json: group_size, bits and mode, and what differs by module."""

    name: str = "mlx"
    summary: str = "MLX checkpoint for Apple silicon"
    capability: Capability = MLX_KERNELS
    container: Container = CONTAINER

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns the MLX layout."""
        return LAYOUTS["mlx"]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what MLX's kernels cannot run."""
        return refusals(self, plan)

    def warnings(self, plan: Plan) -> list[str]:
        """Returns what MLX does with scales that are wider than the model."""
        if all(entry.scheme.scale_dtype != "float16" for entry in plan.quantized().values()):
            return []
        return [
            "scales are float16, so that MLX computes a bfloat16 model in float32. --scale_dtype bf16 keeps it in "
            "bfloat16, --model_dtype fp16 in float16"
        ]

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:  # noqa: ARG002
        """Returns the scheme of most layers, those of the others by name, and False for what stays in 16 bits."""
        base = most_common_scheme(plan, FIELDS)
        entries: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": "affine"}
        for entry in plan.entries:
            own = {"group_size": entry.scheme.group_size, "bits": entry.scheme.bits, "mode": "affine"}
            if not entry.scheme.is_quantized:
                entries[entry.layer.name] = False
            elif own != {name: entries[name] for name in own}:
                entries[entry.layer.name] = own
        embeddings = [name for name in plan.structure.other_weights if name.endswith("embed_tokens.weight")]
        return entries | {name.removesuffix(".weight"): False for name in embeddings}


EXPORTERS.register("mlx")(MlxFormat())
