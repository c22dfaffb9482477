"""What a checkpoint says about itself: its quantization_config, read once into a frozen value that names, for each
linear layer, a scheme and a layout.

Sources: the configs written by auto-round 0.6.0 to 0.16.1, AutoGPTQ / GPTQModel (`dynamic`, `desc_act`,
`checkpoint_format`) and AutoAWQ (`zero_point`, `modules_to_not_convert`); lookup rules as in vLLM, so that a checkpoint
means the same here and there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transformers import AutoRoundConfig

from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.schemes import QuantizationScheme

__all__ = ["AutoRoundConfig", "CheckpointConfig", "LayerPlan", "read_config"]

# packing_format -> layout. "auto_round:gptq" and "auto_round:awq" are Transformers' names for foreign checkpoints.
PACKING_FORMATS = {
    "auto_round": "gptq_zp",
    "auto_round:gptqmodel": "gptq_zp",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_gptq": "gptq",
    "auto_awq": "awq",
}
INT_DATA_TYPES = {"int", "int_sym", "int_asym", "int_sym_gptq"}
GPTQ_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_zp"}
SCHEME_KEYS = ("bits", "group_size", "sym", "data_type", "act_bits")
# Releases before 0.5 wrote the packing into `backend`: "auto_round:gptq:exllamav2", "autoround:awq" ...
OLD_BACKEND = re.compile(r"auto_?round:(?:auto_)?(gptq|awq)(?::.*)?")
# A key of `extra_config` with one of these is a regular expression; a plain dot is part of a name.
REGEX_SIGNS = re.compile(r"[*+?^$()\[\]{}|\\]")

LayerPlan = tuple[QuantizationScheme, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How the layers of a checkpoint are quantized.

    Attributes:
        defaults: bits, group_size, sym, data_type, act_bits of a layer that nothing else is said about.
        layout: name in the registry of layouts.
        backend: what the user, or the checkpoint, asks to run it with.
        blocks: prefixes of the quantized blocks; None: every numbered block of the model.
        extra_config: layer name or regular expression -> changed values; bits >= 16 leaves the layer as it is.
        dynamic: GPTQModel's rules, "-:regex" skips and "+:regex" changes, matched from the start of a name.
        skipped: names, or parts of dotted names, of modules that are not quantized (modules_to_not_convert).
        only: if not empty, parts of names of the modules that are quantized (modules_in_block_to_quantize).
        lm_head: GPTQ's flag for a quantized output layer.
        group_index: the checkpoint stores `g_idx`.
        act_order: GPTQ's desc_act: `g_idx` is not sequential.
    """

    defaults: Mapping[str, Any]
    layout: str
    backend: str = "auto"
    blocks: tuple[str, ...] | None = None
    extra_config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    dynamic: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    lm_head: bool = False
    group_index: bool = False
    act_order: bool = False

    def resolve(self, name: str) -> LayerPlan | None:
        """Returns (scheme, layout name) of the linear layer `name`, or None if it is not quantized.

        The first that says something wins: modules_to_not_convert, the exact name in extra_config, a regular expression
        there. A layer not named so is quantized if it lies in the blocks and in modules_in_block_to_quantize; GPTQ's
        dynamic rules may then change or skip it.

        Raises:
            UnsupportedError: a data type or activation width that cannot be run.
            ConfigError: values that are no scheme.
        """
        if any(_matches(key, name) for key in self.skipped):
            return None
        changes = self._listed(name)
        if changes is None and not self._is_quantized_by_default(name):
            return None
        return self._plan(self._dynamic(name) if changes is None else changes, name)

    def renamed(self, rename: Callable[[str], str]) -> CheckpointConfig:
        """Returns a config that also knows its names as `rename` gives them.

        Transformers 5 renames modules between checkpoint and model (`visual.` -> `model.visual.`); the config uses the
        checkpoint's names.
        """

        def both(names: Iterable[str]) -> list[str]:
            return list(dict.fromkeys(n for name in names for n in (name, _renamed(name, rename))))

        extra = {new: values for key, values in self.extra_config.items() for new in both([key])}
        blocks = None if self.blocks is None else tuple(both(self.blocks))
        return dataclasses.replace(self, blocks=blocks, extra_config=extra)

    def _listed(self, name: str) -> Mapping[str, Any] | None:
        """Returns the changed values of a layer that is listed by name or regular expression; None if it is not."""
        for key in (name, f"model.{name}", name.removeprefix("model.")):
            if key in self.extra_config:
                return self.extra_config[key]
        patterns = [key for key in self.extra_config if REGEX_SIGNS.search(key)]
        for find in (re.fullmatch, re.search):
            for pattern in patterns:
                if find(pattern, name):
                    return self.extra_config[pattern]
        return None

    def _dynamic(self, name: str) -> Mapping[str, Any]:
        for rule, values in self.dynamic.items():
            if re.match(_rule_pattern(rule), name):
                return {"bits": 16} if rule.startswith("-:") else values
        return {}

    def _is_quantized_by_default(self, name: str) -> bool:
        if self.lm_head and name.rpartition(".")[2] == "lm_head":
            return True
        if self.blocks is None:
            inside = any(part.isdigit() for part in name.split("."))
        else:
            inside = any(name == block or name.startswith(block + ".") for block in self.blocks)
        return inside and (not self.only or any(_matches(key, name) for key in self.only))

    def _plan(self, changes: Mapping[str, Any], name: str) -> LayerPlan | None:
        values = dict(self.defaults)
        values.update({key: changes[key] for key in SCHEME_KEYS if changes.get(key) is not None})
        if values["bits"] >= 16:
            return None
        if values["data_type"] not in INT_DATA_TYPES:
            raise UnsupportedError(f"{name}: data_type={values['data_type']!r} cannot be run (only int)")
        if values["act_bits"] < 16:
            raise UnsupportedError(f"{name}: act_bits={values['act_bits']} cannot be run (only 16, plain activations)")
        scheme = QuantizationScheme(bits=values["bits"], group_size=values["group_size"], sym=values["sym"])
        return scheme, self.layout


def read_config(config: Any) -> CheckpointConfig:
    """Reads the `quantization_config` of a model.

    Args:
        config: a dictionary (config.json) or a config object of Transformers.
    Raises:
        UnsupportedError: a packing format, GPTQ or AWQ variant, or rotation that cannot be run.
        ConfigError: an invalid regular expression.
    """
    values = {key: value for key, value in _as_dict(config).items() if value is not None}
    backend = str(values.get("backend", "auto"))
    old = OLD_BACKEND.fullmatch(backend)
    if old:
        backend = "auto"
    layout = _layout(values, old[1] if old else None)
    for key in ("rotation_config", "spinquant_config"):
        if values.get(key):
            raise UnsupportedError(f"checkpoints with rotated weights ({key}) cannot be run")
    sym = values.get("sym", True)
    if layout == "awq" and "zero_point" in values:
        # AutoAWQ's word for "asymmetric". Transformers fills in sym=True where an AWQ config has none.
        sym = not values["zero_point"]
    defaults = {
        "bits": values.get("w_bit", values.get("bits", 4)),
        "group_size": values.get("q_group_size", values.get("group_size", 128)),
        "sym": sym,
        "data_type": values.get("data_type", "int"),
        "act_bits": values.get("act_bits", 16),
    }
    result = CheckpointConfig(
        defaults=defaults,
        layout=layout,
        backend=backend,
        blocks=_blocks(values),
        extra_config=values.get("extra_config", {}),
        dynamic=values.get("dynamic") or {},
        skipped=tuple(_flat(values.get("modules_to_not_convert", ()))),
        only=tuple(_flat(values.get("modules_in_block_to_quantize", ()))),
        lm_head=bool(values.get("lm_head", False)),
        # auto-round's own configs have no desc_act, and their checkpoints no g_idx, but for one packing format.
        group_index=layout != "awq"
        and ("desc_act" in values or values.get("packing_format") == "auto_round:gptqmodel"),
        act_order=bool(values.get("desc_act", False)) and not values.get("static_groups", False),
    )
    _check_patterns(result)
    return result


def _layout(values: Mapping[str, Any], old_packing: str | None) -> str:
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", "auto-round")))
    packing = values.get("packing_format")
    if old_packing and packing in (None, "auto_round:gptq"):
        packing = f"auto_round:{old_packing}"
    if packing is None:
        packing = f"auto_round:{method}" if method in ("gptq", "awq") else "auto_round:auto_gptq"
    if packing not in PACKING_FORMATS:
        hint = nearest(packing, PACKING_FORMATS)
        raise UnsupportedError(
            f"packing_format '{packing}' cannot be loaded.{hint} Allowed: {', '.join(PACKING_FORMATS)}"
        )
    layout = PACKING_FORMATS[packing]
    if layout == "awq" and str(values.get("version", "gemm")).lower() != "gemm":
        raise UnsupportedError(f"AWQ version '{values['version']}' cannot be loaded (only gemm)")
    if layout == "gptq" and "checkpoint_format" in values:
        form = values["checkpoint_format"]
        if form not in GPTQ_FORMATS:
            known = ", ".join(GPTQ_FORMATS)
            raise UnsupportedError(f"GPTQ checkpoint_format '{form}' cannot be loaded. Allowed: {known}")
        layout = GPTQ_FORMATS[form]
    return layout


def _blocks(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    for key in ("block_name_to_quantize", "to_quant_block_names", "quant_block_list"):
        if values.get(key):
            return tuple(dict.fromkeys(block.strip(". ") for block in _flat(values[key]) if block.strip(". ")))
    return None


def _check_patterns(config: CheckpointConfig) -> None:
    """Raises ConfigError for a key that looks like a regular expression and is none."""
    keys = [key for key in (*config.extra_config, *config.skipped, *config.only) if REGEX_SIGNS.search(key)]
    for key in [*keys, *map(_rule_pattern, config.dynamic)]:
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"'{key}' in the quantization_config is no regular expression: {error}") from error


def _rule_pattern(rule: str) -> str:
    return rule.removeprefix("-:").removeprefix("+:")


def _flat(names: Any) -> Iterator[str]:
    """Yields the names in a string with commas, or in lists nested to any depth."""
    if isinstance(names, str):
        yield from (name.strip() for name in names.split(",") if name.strip())
        return
    for name in names:
        yield from _flat(name)


def _matches(key: str, name: str) -> bool:
    """Whether a key names a module: a regular expression found in it, or a run of its dotted parts.

    Parts are compared whole, so "mlp.gate" is not "mlp.gate_proj".
    """
    if REGEX_SIGNS.search(key):
        return re.search(key, name) is not None
    return f".{key.strip('.')}." in f".{name}."


def _renamed(name: str, rename: Callable[[str], str]) -> str:
    # Renaming rules are written for tensor names.
    return name if REGEX_SIGNS.search(name) else rename(f"{name}.weight").removesuffix(".weight")


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))
