"""What one weight becomes: the scheme, and the named presets.

A scheme is a value: frozen, hashable, readable back from a dictionary. It knows nothing of models or files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from auto_round.errors import ConfigError, nearest

SCALE_DTYPES = {"fp16": "float16", "float16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}
SCALE_DTYPES |= {"fp32": "float32", "float32": "float32"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationScheme:
    """How a weight, and optionally the activation it meets, is quantized.

    Attributes:
        bits: width of a stored weight, 2 to 8; 16 keeps the weight as it is.
        group_size: weights of one row that share a scale. -1: the whole row; 0: the whole tensor.
        sym: symmetric codes (no zero point) or asymmetric.
        data_type: name in the registry of data types ("int").
        scale_dtype: precision that scales are rounded to, "float16", "bfloat16" or "float32".
        act_bits: width of activations; 16 leaves them alone.
        act_group_size, act_sym, act_data_type: as above, for activations. None: as for the weight.
        act_dynamic: ranges of activations are computed while the model runs, not calibrated.
        super_bits, super_group_size: double quantization of the scales (GGUF k-quants).
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    scale_dtype: str = "float16"
    act_bits: int = 16
    act_group_size: int | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool = True
    super_bits: int | None = None
    super_group_size: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, what in (("bits", "the weight as it is"), ("act_bits", "activations alone")):
            width = getattr(self, name)
            if isinstance(width, bool) or not isinstance(width, int) or not (2 <= width <= 8 or width == 16):
                problems.append(f"{name}={width!r} (allowed: 2 to 8, or 16 to leave {what})")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < -1:
            problems.append(f"group_size={self.group_size!r} (allowed: a positive number, -1 per row, 0 per tensor)")
        if not isinstance(self.sym, bool):
            problems.append(f"sym={self.sym!r} (allowed: True, False)")
        scale_dtype = str(self.scale_dtype).removeprefix("torch.")
        if scale_dtype not in SCALE_DTYPES:
            problems.append(f"scale_dtype={self.scale_dtype!r} (allowed: fp16, bf16, fp32)")
        if problems:
            raise ConfigError("bad quantization scheme: " + "; ".join(problems))
        object.__setattr__(self, "scale_dtype", SCALE_DTYPES[scale_dtype])

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is quantized at all."""
        return self.bits < 16

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized."""
        return self.act_bits < 16

    def replace(self, **changes: Any) -> QuantizationScheme:
        """Returns a copy with some fields changed.

        Raises:
            ConfigError: an unknown field, or a value that is not allowed.
        """
        check_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as a dictionary that `from_dict` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationScheme:
        """Returns the scheme with the given fields.

        Raises:
            ConfigError: an unknown field, or a value that is not allowed.
        """
        check_fields(values)
        return cls(**values)

    def __str__(self) -> str:
        if not self.is_quantized:
            return "16-bit"
        group = {-1: "per row", 0: "per tensor"}.get(self.group_size, f"g{self.group_size}")
        weight = f"{self.data_type}{self.bits} {group} {'sym' if self.sym else 'asym'}"
        return weight + (f" a{self.act_bits}" if self.quantizes_activations else "")


SCHEME_FIELDS = tuple(f.name for f in dataclasses.fields(QuantizationScheme))


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if `values` has a key that is no field of a scheme."""
    unknown = [name for name in values if name not in SCHEME_FIELDS]
    if unknown:
        hints = "".join(f"'{name}'.{nearest(name, SCHEME_FIELDS)} " for name in unknown)
        raise ConfigError(f"unknown scheme option {hints}Known: {', '.join(SCHEME_FIELDS)}")


def _int_presets() -> dict[str, QuantizationScheme]:
    presets = {}
    for bits in range(2, 9):
        for group_size in (32, 64, 128):
            scheme = QuantizationScheme(bits=bits, group_size=group_size)
            presets[f"W{bits}A16G{group_size}"] = scheme
        presets[f"W{bits}A16"] = presets[f"W{bits}A16G128"]
    presets["INT4"] = presets["W4A16"]
    presets["INT8"] = presets["W8A16"]
    presets["BF16"] = QuantizationScheme(bits=16)
    return presets


PRESET_SCHEMES: dict[str, QuantizationScheme] = _int_presets()


def preset_name_to_scheme(name: str) -> QuantizationScheme:
    """Returns the preset called `name`, upper or lower case; "W4A16G64" forms exist for 2 to 8 bits.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    key = name.strip().upper()
    if key in PRESET_SCHEMES:
        return PRESET_SCHEMES[key]
    form = re.fullmatch(r"W([2-8])A16G(\d+)", key)
    if form:
        return QuantizationScheme(bits=int(form[1]), group_size=int(form[2]))
    known = [preset for preset in PRESET_SCHEMES if not re.search(r"G(32|64|128)$", preset)]
    raise ConfigError(
        f"unknown scheme '{name}'.{nearest(key, PRESET_SCHEMES)} Known: {', '.join(known)}, W<bits>A16G<n>"
    )


def to_scheme(value: str | Mapping[str, Any] | QuantizationScheme) -> QuantizationScheme:
    """Returns a scheme from a preset name, a dictionary of fields, or a scheme."""
    if isinstance(value, QuantizationScheme):
        return value
    if isinstance(value, str):
        return preset_name_to_scheme(value)
    if isinstance(value, Mapping):
        return QuantizationScheme.from_dict(value)
    raise ConfigError(f"scheme must be a preset name, a dictionary or a QuantizationScheme, not {type(value).__name__}")
