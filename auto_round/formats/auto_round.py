"""The auto_round format: one config that Transformers, vLLM and SGLang read, above tensors of several layouts.

For weights that are no integers, and for quantized activations, these are the tensors of compressed-tensors. For
integer weights `auto_round` picks the layout that serving engines load: `auto_round:auto_awq` when every layer is 4-bit
asymmetric, else `auto_round:auto_gptq`. The latter stores zero points minus one; asymmetric grids here start at zero
point 1, so 2, 3 and 8 bits asymmetric are exact in it too and need no layout that only Transformers reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from auto_round import __version__
from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, activation_fields, differing_fields, head_entry, layout_refusals
from auto_round.formats.llm_compressor import compressed_layout, compressed_refusals
from auto_round.layouts import LAYOUTS, Layout
from auto_round.plan import Plan
from auto_round.schemes import QuantizationScheme

COMPRESSED = "auto_round:llm_compressor"
LAYOUT_OF_PACKING = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:gptqmodel": "gptq_zp",
}


@dataclasses.dataclass(frozen=True, slots=True)
class AutoRoundFormat:
    """Checkpoints with quant_method "auto-round".

    Attributes:
        packing: the packing_format, or None to choose by scheme.
    """

    name: str
    summary: str
    packing: str | None = None

    def packing_for(self, plan: Plan) -> str:
        """Returns the packing_format of the whole checkpoint."""
        if self.packing is not None:
            return self.packing
        schemes = [entry.scheme for entry in plan.quantized().values()]
        if any(scheme.data_type != "int" or scheme.quantizes_activations for scheme in schemes):
            return COMPRESSED
        if all(scheme.bits == 4 and not scheme.sym for scheme in schemes):
            return "auto_round:auto_awq"
        return "auto_round:auto_gptq"

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:
        """Returns the layout of the packing_format."""
        packing = self.packing_for(plan)
        return compressed_layout(scheme) if packing == COMPRESSED else LAYOUTS[LAYOUT_OF_PACKING[packing]]

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what the layout cannot hold."""
        return compressed_refusals(plan) if self.packing_for(plan) == COMPRESSED else layout_refusals(self, plan)

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:
        """Returns the keys that vLLM, SGLang and Transformers read, and those of the tuning that are not defaults."""
        base, tune = plan.base, config.tune
        entries: dict[str, Any] = {
            "bits": base.bits if base.is_quantized else 4,
            "data_type": base.data_type,
            "group_size": base.group_size,
            "sym": base.sym,
            **activation_fields(base),
        }
        described = {"iters": tune.iters, "nsamples": config.calib.nsamples, "seqlen": config.calib.seqlen}
        described |= {
            "batch_size": tune.batch_size,
            "lr": tune.lr,
            "minmax_lr": tune.minmax_lr,
            "nblocks": tune.nblocks,
        }
        described |= {"gradient_accumulate_steps": tune.gradient_accumulate_steps, "seed": tune.seed}
        described |= {"enable_quanted_input": tune.enable_quanted_input, "enable_alg_ext": tune.enable_alg_ext}
        described |= {"enable_minmax_tuning": tune.enable_minmax_tuning, "scale_dtype": f"torch.{base.scale_dtype}"}
        described |= {"enable_norm_bias_tuning": tune.enable_norm_bias_tuning}
        entries |= {name: value for name, value in described.items() if value != DEFAULTS.get(name)}
        if isinstance(config.calib.dataset, str) and tune.needs_calibration:
            entries["dataset"] = config.calib.dataset
        entries["autoround_version"] = __version__
        entries["block_name_to_quantize"] = ",".join(plan.structure.block_lists)
        entries["quant_method"] = "auto-round"
        entries["packing_format"] = self.packing_for(plan)
        extra = {
            entry.layer.name: fields
            for entry in plan.entries
            if entry.layer.block is not None and (fields := differing_fields(entry.scheme, base))
        }
        extra |= head_entry(plan)
        return entries | ({"extra_config": extra} if extra else {})


# Values that need not be said in a checkpoint.
DEFAULTS = {
    "nsamples": 128, "seqlen": 2048, "batch_size": 8, "lr": None, "minmax_lr": None, "nblocks": 1, "iters": 200,
    "gradient_accumulate_steps": 1, "seed": 42, "enable_quanted_input": True, "enable_alg_ext": False,
    "enable_minmax_tuning": True, "enable_norm_bias_tuning": False, "scale_dtype": "torch.float16",
}  # fmt: skip


def _register(name: str, summary: str, packing: str | None = None) -> None:
    EXPORTERS.register(name)(AutoRoundFormat(name, summary, packing))


_register("auto_round", "Transformers, vLLM, SGLang; the layout is chosen by scheme")
_register("auto_round:auto_gptq", "as auto_round, GPTQ tensors (zero points stored minus one)", "auto_round:auto_gptq")
_register("auto_round:auto_awq", "as auto_round, AWQ tensors (4 bits only)", "auto_round:auto_awq")
_register(COMPRESSED, "as auto_round, compressed-tensors tensors: FP8, MXFP4, MXFP8, NVFP4, integers", COMPRESSED)
_register(
    "auto_round:gptqmodel", "GPTQ tensors with zero points as they are; Transformers only", "auto_round:gptqmodel"
)
