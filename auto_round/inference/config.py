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

from auto_round.data_types import DATA_TYPES
from auto_round.data_types.activations import why_not_activation
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.inference.packing import layout_of, read_packing
from auto_round.schemes import QuantizationScheme

__all__ = ["CheckpointConfig", "LayerPlan", "read_config"]

# Spellings of "int" that schemes do not know.
INT_DATA_TYPES = {"int_sym_gptq": "int"}
ACTIVATION_KEYS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")
SCHEME_KEYS = ("bits", "group_size", "sym", "data_type", *ACTIVATION_KEYS)
# Releases before 0.5 wrote the packing into `backend`: "auto_round:gptq:exllamav2", "autoround:awq" ...
OLD_BACKEND = re.compile(r"auto_?round:(?:auto_)?(gptq|awq)(?::.*)?")
# A key of `extra_config` with one of these is a regular expression; a plain dot is part of a name.
REGEX_SIGNS = re.compile(r"[*+?^$()\[\]{}|\\]")

LayerPlan = tuple[QuantizationScheme, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How the layers of a checkpoint are quantized.

    Attributes:
        defaults: bits, group_size, sym, data_type, act_* of a layer that nothing else is said about.
        packing: a layout, or a rule by which each scheme has one, see packing.py.
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
    packing: str
    backend: str = "auto"
    blocks: tuple[str, ...] | None = None
    extra_config: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    dynamic: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    lm_head: bool = False
    group_index: bool = False
    act_order: bool = False

    def resolve(self, name: str, *others: str) -> LayerPlan | None:
        """Returns (scheme, layout name) of the linear layer `name`, or None if it is not quantized.

        The first that says something wins: modules_to_not_convert, the exact name in extra_config, a regular expression
        there. A layer not named so is quantized if it lies in the blocks and in modules_in_block_to_quantize; GPTQ's
        dynamic rules may then change or skip it.

        Args:
            name: in the model.
            others: by which it may be known too, as that in the checkpoint.
        Raises:
            UnsupportedError: weights or activations of a kind that cannot be run.
            ConfigError: values that are no scheme.
        """
        names = tuple(dict.fromkeys((name, *others)))
        if any(_matches(key, known) for key in self.skipped for known in names):
            return None
        listed = (self._listed(known) for known in names)
        changes = next((found for found in listed if found is not None), None)
        if changes is None and not any(self._is_quantized_by_default(known) for known in names):
            return None
        ruled = next((found for known in names if (found := self._dynamic(known))), {})
        return self._plan(ruled if changes is None else changes, name)

    def is_listed_as_plain(self, *names: str) -> bool:
        """Whether a module is listed by one of its names as not quantized."""
        listed = (self._listed(name) for name in names)
        if any((found or {}).get("bits", 0) >= 16 for found in listed):
            return True
        return any(_matches(key, name) for key in self.skipped for name in names)

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
        scheme = _scheme(values, name)
        return scheme, layout_of(self.packing, scheme)


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
    packing = read_packing(values, old[1] if old else None)
    for key in ("rotation_config", "spinquant_config"):
        if values.get(key):
            raise UnsupportedError(f"checkpoints with rotated weights ({key}) cannot be run")
    sym = values.get("sym", True)
    if packing == "awq" and "zero_point" in values:
        # AutoAWQ's word for "asymmetric". Transformers fills in sym=True where an AWQ config has none.
        sym = not values["zero_point"]
    defaults = {
        "bits": values.get("w_bit", values.get("bits", 4)),
        "group_size": values.get("q_group_size", values.get("weight_block_size", values.get("group_size", 128))),
        "sym": sym,
        "data_type": values.get("data_type", "int"),
        **{key: values[key] for key in ACTIVATION_KEYS if key in values},
    }
    result = CheckpointConfig(
        defaults=defaults,
        packing=packing,
        backend=backend,
        blocks=_blocks(values),
        extra_config=values.get("extra_config", {}),
        dynamic=values.get("dynamic") or {},
        skipped=tuple(_flat(values.get("modules_to_not_convert", ()))),
        only=tuple(_flat(values.get("modules_in_block_to_quantize", ()))),
        lm_head=bool(values.get("lm_head", False)),
        # auto-round's own configs have no desc_act, and their checkpoints no g_idx, but for one packing format.
        group_index=packing in ("gptq", "gptq_zp")
        and ("desc_act" in values or values.get("packing_format") == "auto_round:gptqmodel"),
        act_order=bool(values.get("desc_act", False)) and not values.get("static_groups", False),
    )
    _check_patterns(result)
    return result


def _scheme(values: Mapping[str, Any], name: str) -> QuantizationScheme:
    """Returns the scheme of the layer `name`; activations of 16 bits and more are left alone."""
    data_type = INT_DATA_TYPES.get(values["data_type"], values["data_type"])
    fields = {**values, "data_type": data_type}
    if values.get("act_bits", 16) >= 16:
        fields = {key: value for key, value in fields.items() if key not in ACTIVATION_KEYS}
    scheme = QuantizationScheme.from_dict(fields)
    if scheme.data_type not in DATA_TYPES:
        known = ", ".join(sorted(DATA_TYPES))
        raise UnsupportedError(f"{name}: data_type={values['data_type']!r} cannot be run (only {known})")
    reason = None if scheme.data_type == "int" else DATA_TYPES[scheme.data_type].refuses(scheme)
    if scheme.activation is not None:
        reason = reason or why_not_activation(scheme.activation)
    if reason:
        raise UnsupportedError(f"{name}: {reason} cannot be run")
    return scheme


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
    return name if REGEX_SIGNS.search(name) else rename(name)


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))
