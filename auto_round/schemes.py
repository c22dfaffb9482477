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
        group_size: weights of one row that share a scale. -1: the whole row; 0: the whole tensor; a pair (rows,
            columns): a block of the matrix.
        sym: symmetric codes (no zero point) or asymmetric.
        data_type: name in the registry of data types: "int", "fp", "mx_fp", "nv_fp" ... Common spellings with the
            width in the name ("mx_fp4", "fp8", "int_sym") are taken too.
        scale_dtype: precision that scales are rounded to, "float16", "bfloat16" or "float32". MX and NVFP4 have scale
            formats of their own.
        act_bits: width of activations; 16 leaves them alone.
        act_group_size, act_sym, act_data_type: as above, for activations. None: as for the weight. Groups of
            activations: -1 per token, 0 per tensor, else that many neighbouring features of a token.
        act_dynamic: ranges of activations are computed while the model runs, not calibrated.
        super_bits, super_group_size: double quantization (GGUF k-quants): scales and minima of this many neighbouring
            groups are codes of `super_bits` under a common scale of `scale_dtype`.
    """

    bits: int = 4
    group_size: int | tuple[int, int] = 128
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
        if isinstance(self.group_size, list):  # as JSON gives a pair
            object.__setattr__(self, "group_size", tuple(self.group_size))
        if not _is_group_size(self.group_size):
            problems.append(
                f"group_size={self.group_size!r} (allowed: a positive number, -1 per row, 0 per tensor, or a pair of "
                "rows and columns)"
            )
        if self.act_group_size is not None and not isinstance(self.act_group_size, int):
            problems.append(f"act_group_size={self.act_group_size!r} (allowed: a number, -1 per token, 0 per tensor)")
        if not isinstance(self.sym, bool):
            problems.append(f"sym={self.sym!r} (allowed: True, False)")
        problems += self._settle_data_types()
        scale_dtype = str(self.scale_dtype).removeprefix("torch.")
        if scale_dtype not in SCALE_DTYPES:
            problems.append(f"scale_dtype={self.scale_dtype!r} (allowed: fp16, bf16, fp32)")
        if problems:
            raise ConfigError("bad quantization scheme: " + "; ".join(problems))
        object.__setattr__(self, "scale_dtype", SCALE_DTYPES[scale_dtype])

    def _settle_data_types(self) -> list[str]:
        """Replaces spellings of data types by their registered names; returns what contradicts the widths."""
        problems = []
        for field, width, sym in (("data_type", "bits", "sym"), ("act_data_type", "act_bits", "act_sym")):
            given, bits = getattr(self, field), getattr(self, width)
            if given is None:
                continue
            name, implied = canonical_data_type(given)
            object.__setattr__(self, field, name)
            if bits != 16 and implied.get("bits", bits) != bits:
                problems.append(f"{field}={given!r} has {implied['bits']} bits, but {width}={bits}")
            if "sym" in implied and getattr(self, sym) not in (None, implied["sym"]):
                problems.append(f"{field}={given!r} contradicts {sym}={getattr(self, sym)}")
        return problems

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is quantized at all."""
        return self.bits < 16

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized."""
        return self.act_bits < 16

    @property
    def activation(self) -> ActivationScheme | None:
        """How the activation is quantized, or None for 16 bits."""
        if not self.quantizes_activations:
            return None
        own = self.group_size if isinstance(self.group_size, int) else self.group_size[1]
        return ActivationScheme(
            data_type=self.act_data_type or self.data_type,
            bits=self.act_bits,
            group_size=own if self.act_group_size is None else self.act_group_size,
            sym=self.sym if self.act_sym is None else self.act_sym,
            dynamic=self.act_dynamic,
        )

    def replace(self, **changes: Any) -> QuantizationScheme:
        """Returns a copy with some fields changed; a changed data type brings its own group size if none is given.

        Raises:
            ConfigError: an unknown field, or a value that is not allowed.
        """
        check_fields(changes)
        if canonical_data_type(changes.get("data_type", self.data_type))[0] != self.data_type:
            changes = _completed(changes)
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
        return cls(**_completed(values))

    def __str__(self) -> str:
        if not self.is_quantized:
            return "16-bit"
        weight = f"{self.data_type}{self.bits} {group_words(self.group_size)}"
        if self.data_type.startswith("int"):
            weight += " sym" if self.sym else " asym"
        return weight + (f", activations {self.activation}" if self.quantizes_activations else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the input of a linear layer is quantized; fields as `act_*` of QuantizationScheme, nothing left open."""

    data_type: str
    bits: int
    group_size: int
    sym: bool
    dynamic: bool

    @property
    def needs_calibration(self) -> bool:
        """Whether a number measured on calibration text is stored in the checkpoint."""
        return not self.dynamic or self.data_type == STATIC_GLOBAL_SCALE

    def __str__(self) -> str:
        group = {-1: "per token", 0: "per tensor"}.get(self.group_size, f"g{self.group_size}")
        return f"{self.data_type}{self.bits} {group} {'dynamic' if self.dynamic else 'static'}"


# Activations of NVFP4 as serving engines run them: block scales at run time, the scale above them calibrated.
STATIC_GLOBAL_SCALE = "nv_fp4_with_static_gs"
# Spellings of data types in checkpoints and scripts of auto-round 0.6 to 0.16 -> registered name, what they imply.
DATA_TYPE_SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int_sym": ("int", {"sym": True}),
    "int_asym": ("int", {"sym": False}),
    "int_sym_dq": ("int_dq", {"sym": True}),
    "int_asym_dq": ("int_dq", {"sym": False}),
    "int_asym_float_zp": ("int_float_zp", {"sym": False}),
    "fp8": ("fp", {"bits": 8}),
    "fp8_sym": ("fp", {"bits": 8}),
    "fp8_e4m3": ("fp", {"bits": 8}),
    "fp8_e5m2": ("fp_e5m2", {"bits": 8}),
    "mx_fp4": ("mx_fp", {"bits": 4}),
    "mx_fp6": ("mx_fp", {"bits": 6}),
    "mx_fp6e3m2": ("mx_fp_e3m2", {"bits": 6}),
    "mx_fp8": ("mx_fp", {"bits": 8}),
    "mx_fp8e5m2": ("mx_fp_e5m2", {"bits": 8}),
    "mx_int4": ("mx_int", {"bits": 4}),
    "mx_int8": ("mx_int", {"bits": 8}),
    "nv_fp4": ("nv_fp", {"bits": 4}),
}
# What a data type brings with it where nothing is said. The groups of MX (32) and NVFP4 (16) are part of the formats.
# FP8 scales are bfloat16, because loaders keep them in the model's precision.
DATA_TYPE_FIELDS: dict[str, dict[str, Any]] = {
    "mx_fp": {"group_size": 32},
    "mx_fp_e3m2": {"group_size": 32, "bits": 6},
    "mx_fp_e5m2": {"group_size": 32, "bits": 8},
    "mx_int": {"group_size": 32},
    "int_float_zp": {"group_size": 32, "sym": False},
    "nv_fp": {"group_size": 16, "bits": 4},
    "fp": {"group_size": -1, "bits": 8, "scale_dtype": "bfloat16"},
    "fp_e5m2": {"group_size": -1, "bits": 8, "scale_dtype": "bfloat16"},
}


def canonical_data_type(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the registered name of a data type and what the given spelling says of bits and symmetry."""
    return DATA_TYPE_SPELLINGS.get(str(name), (str(name), {}))


def group_words(group_size: int | tuple[int, int]) -> str:
    """Returns a group size in words: "g128", "per row", "per tensor", "128x128 blocks"."""
    if isinstance(group_size, tuple):
        return f"{group_size[0]}x{group_size[1]} blocks"
    return {-1: "per row", 0: "per tensor"}.get(group_size, f"g{group_size}")


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scheme fields with those that their data type implies, unless they are given."""
    if "data_type" not in values:
        return dict(values)
    name, implied = canonical_data_type(values["data_type"])
    return {**DATA_TYPE_FIELDS.get(name, {}), **implied, **values}


def _is_group_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1


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
    per_token: dict[str, Any] = {"act_group_size": -1, "act_sym": True, "act_data_type": "int"}
    presets["W4A8"] = QuantizationScheme(bits=4, act_bits=8, **per_token)
    presets["INT8_W8A8"] = presets["INT8"] = QuantizationScheme(bits=8, group_size=-1, act_bits=8, **per_token)
    presets["INT4"] = QuantizationScheme(bits=4, group_size=-1, act_bits=4, **per_token)
    presets["BF16"] = QuantizationScheme(bits=16)
    return presets


def _float_presets() -> dict[str, QuantizationScheme]:
    presets = {}
    for name, data_type, bits in (("MXFP4", "mx_fp", 4), ("MXFP6", "mx_fp", 6), ("MXFP8", "mx_fp", 8)):
        presets[name] = _scheme(data_type=data_type, bits=bits, act_bits=bits)
        presets[f"{name}_RCEIL"] = _scheme(data_type=data_type, bits=bits, act_bits=bits, act_data_type="mx_fp_rceil")
    presets["MXINT4"] = _scheme(data_type="mx_int", bits=4, act_bits=4)
    presets["MXINT8"] = _scheme(data_type="mx_int", bits=8, act_bits=8)
    presets["NVFP4"] = _scheme(data_type="nv_fp", act_bits=4, act_data_type=STATIC_GLOBAL_SCALE)
    presets["FP8_STATIC"] = _scheme(data_type="fp", act_bits=8, act_group_size=0, act_dynamic=False)
    presets["FP8_DYNAMIC"] = _scheme(data_type="fp", act_bits=8, act_group_size=-1)
    presets["FP8_BLOCK"] = _scheme(data_type="fp", group_size=(128, 128), act_bits=8, act_group_size=128)
    presets["FPW8A16"] = _scheme(data_type="fp")
    presets["MXFP4A16"] = _scheme(data_type="mx_fp", bits=4)
    presets["NVFP4A16"] = _scheme(data_type="nv_fp")
    return presets


def _gguf_presets() -> dict[str, QuantizationScheme]:
    """Returns the block types of GGUF by name. Each is one type; mixtures such as Q4_K_M are a matter of the format."""
    presets = {f"GGUF:{name}": QuantizationScheme(bits=16) for name in ("F32", "F16", "FP16", "BF16")}
    for bits in (4, 5, 8):
        presets[f"GGUF:Q{bits}_0"] = QuantizationScheme(bits=bits, group_size=32)
    for bits in (4, 5):
        presets[f"GGUF:Q{bits}_1"] = _scheme(data_type="int_float_zp", bits=bits)
    for bits, group_size, sym, super_bits in (
        (2, 16, False, 4),
        (3, 16, True, 6),
        (4, 32, False, 6),
        (5, 32, False, 6),
        (6, 16, True, 8),
    ):
        presets[f"GGUF:Q{bits}_K"] = QuantizationScheme(
            data_type="int_dq",
            bits=bits,
            group_size=group_size,
            sym=sym,
            super_bits=super_bits,
            super_group_size=256 // group_size,
        )
    return presets


def _scheme(**fields: Any) -> QuantizationScheme:
    return QuantizationScheme.from_dict(fields)


PRESET_SCHEMES: dict[str, QuantizationScheme] = _int_presets() | _float_presets() | _gguf_presets()


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
