"""The llm_compressor format: compressed-tensors checkpoints, which vLLM, SGLang and Transformers load.

The config is what compressed-tensors 0.20 calls QuantizationConfig, as plain dictionaries: a group for each scheme with
the layers that have it, and every other layer in `ignore`. Source: compressed_tensors quantization/quant_config.py,
quant_args.py and compressors/; vLLM layers/quantization/compressed_tensors/compressed_tensors.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from auto_round.config import RunConfig
from auto_round.formats.base import EXPORTERS, Container
from auto_round.formats.capability import Capability, SchemeSet, counted
from auto_round.formats.layer_rules import family_of, other_modules
from auto_round.layouts import Layout
from auto_round.layouts.by_scheme import FLOAT_LAYOUTS, compressed_layout, is_int8_product
from auto_round.plan import Plan, PlanEntry
from auto_round.schemes import STATIC_GLOBAL_SCALE, ActivationScheme, QuantizationScheme

# Layout -> name of the compression format.
COMPRESSION_FORMATS = {
    "ct_packed": "pack-quantized",
    "ct_int8": "int-quantized",
    "fp8": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
FP8_WEIGHT_ONLY = "naive-quantized"  # the same tensors; the name that compressed-tensors gives them without activations
SCALE_DTYPES = {"mx_fp": "torch.uint8", "nv_fp": "torch.float8_e4m3fn"}
# Keys and values under one calibrated scale for each layer, `k_scale` and `v_scale` beside its projections.
FP8_CACHE = {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
NO_GROUPS: frozenset[int | tuple[int, int]] = frozenset()
EIGHT = frozenset({8})
SYM, DYNAMIC, STATIC = frozenset({True}), frozenset({True}), frozenset({False})


def _float_set(name: str, bits: int, group: int, act_type: set[str]) -> SchemeSet:
    """Returns the schemes of an MX or NVFP4 type: weights alone, or activations of the same width."""
    return SchemeSet(
        data_types=frozenset({name}), bits=frozenset({bits}), sym=SYM, group_sizes=frozenset({group}), per_row=False,
        act_bits=frozenset({bits, 16}), act_data_types=frozenset(act_type), act_group_sizes=frozenset({group}),
        act_dynamic=DYNAMIC,
    )  # fmt: skip


FP8 = SchemeSet(data_types=frozenset({"fp"}), bits=EIGHT, sym=SYM, group_sizes=NO_GROUPS, per_tensor=True)
QUANTIZED_FP8 = dataclasses.replace(FP8, act_bits=EIGHT, act_data_types=frozenset({"fp"}))
INT_TO_INT = SchemeSet(act_bits=frozenset({4, 8}), act_data_types=frozenset({"int"}), act_dynamic=DYNAMIC)
COMPRESSED_TENSORS = Capability(
    schemes=(
        SchemeSet(),
        INT_TO_INT,
        dataclasses.replace(
            INT_TO_INT, bits=EIGHT, sym=SYM, group_sizes=NO_GROUPS, act_bits=EIGHT, act_group_sizes=frozenset({0}),
            act_dynamic=STATIC,
        ),
        FP8,
        dataclasses.replace(QUANTIZED_FP8, act_group_sizes=frozenset({-1}), act_dynamic=DYNAMIC),
        dataclasses.replace(QUANTIZED_FP8, act_group_sizes=frozenset({0}), act_dynamic=STATIC),
        dataclasses.replace(
            QUANTIZED_FP8, group_sizes=frozenset({(128, 128)}), per_row=False, per_tensor=False,
            act_bits=frozenset({8, 16}), act_group_sizes=frozenset({128}), act_dynamic=DYNAMIC,
        ),
        _float_set("mx_fp", 4, 32, {"mx_fp", "mx_fp_rceil"}),
        _float_set("mx_fp", 8, 32, {"mx_fp", "mx_fp_rceil"}),
        _float_set("nv_fp", 4, 16, {STATIC_GLOBAL_SCALE}),
    ),
    loads_in="Transformers with compressed-tensors, vLLM, SGLang",
    loads_here=True,
    outside=True,
    transposed=False,
    cache_scales=True,
    fused_experts=False,
)  # fmt: skip
CONTAINER = Container()
BY_SCHEME = "Give these layers another scheme with --scheme or --layer_config, or use --format fake"
BY_LAYER = "Keep these layers in 16 bits with --fp_layers"


@dataclasses.dataclass(frozen=True, slots=True)
class LlmCompressorFormat:
    """Checkpoints with quant_method "compressed-tensors"."""

    name: str = "llm_compressor"
    summary: str = "compressed-tensors, as llm-compressor writes it"
    capability: Capability = COMPRESSED_TENSORS
    container: Container = CONTAINER

    def layout_for(self, scheme: QuantizationScheme, plan: Plan) -> Layout | None:  # noqa: ARG002
        """Returns the layout of a scheme's compression format."""
        return compressed_layout(scheme)

    def refusals(self, plan: Plan) -> list[str]:
        """Returns what no compression format holds."""
        return compressed_refusals(plan, self.capability)

    def warnings(self, plan: Plan) -> list[str]:
        """Returns which experts Transformers does not load, or loads wrong; serving engines read all the same."""
        grouped: dict[str, list[PlanEntry]] = {}
        for entry in plan.quantized().values():
            if ".experts." in entry.layer.name and (why := _why_not_in_transformers(entry.scheme)):
                grouped.setdefault(why, []).append(entry)
        return [
            f"Transformers {why} ({counted(entries)}). vLLM and SGLang take them; for Transformers use "
            "--format auto_round"
            for why, entries in grouped.items()
        ]

    def quantization_config(self, plan: Plan, config: RunConfig) -> dict[str, Any]:
        """Returns the QuantizationConfig of compressed-tensors."""
        groups = config_groups(plan)
        formats = {group["format"] for group in groups.values()}
        return {
            "config_groups": groups,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "ignore": ignored(plan) + (_ignored_below(plan) if config.model_free else []),
            "kv_cache_scheme": dict(FP8_CACHE) if plan.has_cache_scales else None,
            "provider": "auto-round",
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }


def _why_not_in_transformers(scheme: QuantizationScheme) -> str | None:
    """Returns what goes wrong with experts of a scheme, measured with Transformers 5.23 and compressed-tensors 0.20.

    Its CompressedTensorsDequantize takes every float8 weight for one with a scale that broadcasts, and hands nothing
    but codes, scales and shapes of packed ones to compressed-tensors. It does well with symmetric packed integers,
    MXFP4, and FP8 per row or tensor.
    """
    layout = compressed_layout(scheme).name
    if layout == "nvfp4":
        return "ignores the global scales of NVFP4 experts, and loads wrong weights without an error"
    if layout == "mxfp8" or isinstance(scheme.group_size, tuple):
        return "fails on experts in FP8 whose scales are for groups or blocks"
    if layout == "ct_int8":
        return "fails on experts in INT8"
    return None if scheme.sym or scheme.data_type != "int" else "fails on experts with zero points"


def compression_format(scheme: QuantizationScheme) -> str:
    """Returns the name of a scheme's compression format."""
    layout = compressed_layout(scheme).name
    return FP8_WEIGHT_ONLY if layout == "fp8" and scheme.activation is None else COMPRESSION_FORMATS[layout]


def config_groups(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns group name -> what the layers of one scheme become, in the order of the layers."""
    members: dict[str, list[PlanEntry]] = {}
    for entry in plan.quantized().values():
        described = {
            "format": compression_format(entry.scheme),
            "input_activations": activation_args(entry.scheme.activation),
            "output_activations": None,
            "weights": weight_args(entry.scheme),
        }
        members.setdefault(json.dumps(described), []).append(entry)
    return {
        f"group_{index}": {**json.loads(described), "targets": _targets(plan, entries, alone=len(members) == 1)}
        for index, (described, entries) in enumerate(members.items())
    }


def weight_args(scheme: QuantizationScheme) -> dict[str, Any]:
    """Returns the QuantizationArgs of a weight."""
    size = scheme.group_size
    args: dict[str, Any] = {"dynamic": False, "group_size": None, "num_bits": scheme.bits}
    if isinstance(size, tuple):
        args |= {"strategy": "block", "block_structure": list(size)}
    elif size > 0:
        args |= {"strategy": "tensor_group" if scheme.data_type == "nv_fp" else "group", "group_size": size}
    else:
        args |= {"strategy": "tensor" if size == 0 else "channel"}
    if scheme.data_type in SCALE_DTYPES:
        args["scale_dtype"] = SCALE_DTYPES[scheme.data_type]
    return args | {"symmetric": scheme.sym, "type": "int" if scheme.data_type == "int" else "float"}


def activation_args(activation: ActivationScheme | None) -> dict[str, Any] | None:
    """Returns the QuantizationArgs of a layer's input, None for 16 bits."""
    if activation is None:
        return None
    size, integer = activation.group_size, activation.data_type == "int"
    args: dict[str, Any] = {"dynamic": activation.dynamic, "group_size": None, "num_bits": activation.bits}
    if activation.data_type == STATIC_GLOBAL_SCALE:
        scale_dtype = SCALE_DTYPES["nv_fp"]
        args |= {"dynamic": "local", "observer": "static_minmax", "scale_dtype": scale_dtype}
        args |= {"strategy": "tensor_group", "group_size": size}
    elif size > 0:
        args |= {"strategy": "group", "group_size": size}
    else:
        args |= {"strategy": "tensor" if size == 0 else "token"}
    if activation.data_type.startswith("mx_fp"):
        args["scale_dtype"] = SCALE_DTYPES["mx_fp"]
    return args | {"symmetric": activation.sym or not integer, "type": "int" if integer else "float"}


def _targets(plan: Plan, entries: Sequence[PlanEntry], *, alone: bool) -> list[str]:
    """Returns what tells a group's layers: the class, or names and expressions that no other layer matches.

    The class is used only where it says all: vLLM looks for it before it looks for the parts of joined layers, and
    takes it for fused experts too, but not for the output layer.
    """
    if alone and not any("experts" in reason for reason in plan.structure.other_weights.values()):
        return ["Linear", *(entry.layer.name for entry in entries if entry.layer.block is None)]
    names = [entry.layer.name for entry in plan.entries]
    chosen = {entry.layer.name for entry in entries}
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family_of(name), []).append(name)
    found: list[str] = []
    for family, members in families.items():
        inside = [name for name in members if name in chosen]
        found += [f"re:{family}$"] if len(inside) == len(members) > 1 else inside
    return found


def ignored(plan: Plan) -> list[str]:
    """Returns the linear layers in 16 bits by name, and expressions for routers and experts, which engines take for
    linear layers."""
    linear = [entry.layer.name for entry in plan.entries if not entry.scheme.is_quantized]
    return [*linear, *(rf"re:{re.escape(name)}(?:\..*)?$" for name in other_modules(plan))]


def _ignored_below(plan: Plan) -> list[str]:
    """Returns expressions for what `ignored` names, below any other module; nothing for plain language models.

    The code of vision-language models calls modules otherwise than checkpoints do: it puts "model." before a vision
    tower, and takes "language_model." from before an output layer.
    """
    others = [e.layer for e in plan.entries if e.layer.block is None and e.layer.name != plan.structure.head]
    if not others:
        return []
    names = [e.layer.name for e in plan.entries if not e.scheme.is_quantized and e.layer.name != plan.structure.head]
    head = plan.structure.head
    if head is not None and f"{head}.weight" not in plan.quantized():
        names.append(head.rpartition(".")[2])
    names += other_modules(plan)
    return [rf"re:(?:.*\.)?{re.escape(name)}(?:\..*)?$" for name in names]


def compressed_refusals(plan: Plan, capability: Capability) -> list[str]:
    """Returns why a plan cannot be held, equal reasons joined with a layer count, each with what to do.

    What no engine takes together is told in the words of its types; the rest as the capability declares it.
    """
    grouped: dict[tuple[str, str], list[PlanEntry]] = {}
    for entry in plan.quantized().values():
        for refusal in _refusals_of(entry):
            grouped.setdefault(refusal, []).append(entry)
    texts = [f"cannot store {reason} for {counted(entries)}. {advice}" for (reason, advice), entries in grouped.items()]
    return texts or capability.refusals(plan)


def _refusals_of(entry: PlanEntry) -> list[tuple[str, str]]:
    """Returns (reason, what to do) for what keeps a layer from being held."""
    scheme, shape = entry.scheme, entry.layer.shape
    if scheme.data_type != "int" and (scheme.data_type, scheme.bits) not in FLOAT_LAYOUTS:
        known = ", ".join(f"{name} {bits}" for name, bits in FLOAT_LAYOUTS)
        return [(f"data_type={scheme.data_type} bits={scheme.bits} (only int 2 to 8, {known})", BY_SCHEME)]
    found = []
    if entry.layer.transposed:
        found.append(("weights that the model stores transposed", "Use --format auto_round or fake"))
    unfit = compressed_layout(scheme).refuses(scheme, shape)
    if unfit:
        found.append((unfit, BY_LAYER if unfit.startswith("groups") else BY_SCHEME))
    if isinstance(scheme.group_size, tuple) and shape[1] % scheme.group_size[1]:
        found.append((f"blocks of {scheme.group_size[1]} in {shape[1]} inputs (only whole blocks)", BY_LAYER))
    activation = scheme.activation
    if activation is not None:
        unfit = _why_not_activation(scheme, activation)
        found += [(unfit, BY_SCHEME)] if unfit else []
        size, said = activation.group_size, _size_along_row(scheme)
        if not unfit and size > 0 and size != said and shape[1] % size:
            found.append((f"activations in groups of {size} for {shape[1]} inputs (only whole groups)", BY_LAYER))
    return found


def _size_along_row(scheme: QuantizationScheme) -> int:
    return scheme.group_size[1] if isinstance(scheme.group_size, tuple) else scheme.group_size


def _why_not_activation(scheme: QuantizationScheme, activation: ActivationScheme) -> str | None:
    """Returns why engines would not quantize activations so for these weights, or None."""
    kind, bits, size = activation.data_type, activation.bits, activation.group_size
    if scheme.data_type == "int" and is_int8_product(scheme):
        fits = (activation.dynamic and size == -1) or (not activation.dynamic and size == 0 and activation.sym)
        allowed = "per token as in INT8_W8A8, or per tensor static and symmetric"
    elif scheme.data_type == "int":
        fits = kind == "int" and bits in (4, 8) and activation.dynamic and activation.sym and size != 0
        allowed = "int4 or int8, symmetric and dynamic, per token or in groups, as in W4A8"
    elif isinstance(scheme.group_size, tuple):
        fits = kind == "fp" and activation.dynamic and size == scheme.group_size[1]
        allowed = f"fp8 g{scheme.group_size[1]} dynamic as in FP8_BLOCK"
    elif scheme.data_type == "fp":
        fits = kind == "fp" and ((activation.dynamic and size == -1) or (not activation.dynamic and size == 0))
        allowed = "fp8 per token dynamic as in FP8_DYNAMIC, or per tensor static as in FP8_STATIC"
    elif scheme.data_type == "nv_fp":
        fits, allowed = kind == STATIC_GLOBAL_SCALE, f"{STATIC_GLOBAL_SCALE} as in NVFP4"
    else:
        fits = kind in ("mx_fp", "mx_fp_rceil") and bits == scheme.bits
        allowed = f"mx_fp{scheme.bits} as in MXFP{scheme.bits}"
    weights = f"{scheme.data_type}{scheme.bits} weights"
    return None if fits else f"activations {activation} with {weights} (only {allowed})"


EXPORTERS.register("llm_compressor", "llmcompressor")(LlmCompressorFormat())
