"""Values of options that are more than a number or a word: sizes, lists of formats, layer_config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError


def parse_size(text: str) -> int:
    """Returns bytes for "5GB", "300MB" or a plain number.

    Raises:
        ConfigError: it is no size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    cleaned = text.strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        if cleaned.endswith(unit):
            number, factor = cleaned.removesuffix(unit), units[unit]
            break
    else:
        number, factor = cleaned, 1
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        raise ConfigError(f"'{text}' is no size. Write for example 5GB or 300MB") from None
    if size <= 0:
        raise ConfigError(f"'{text}' must be larger than 0")
    return size


def parse_formats(text: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the export formats of a comma separated list, in order, without repeats."""
    names = text.split(",") if isinstance(text, str) else list(text)
    cleaned = [name.strip().lower() for name in names if name.strip()]
    if not cleaned:
        raise ConfigError("no export format given. Write for example --format auto_round")
    return tuple(dict.fromkeys(cleaned))


def parse_layer_config(value: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a layer_config from a mapping, JSON text, or the path of a JSON file.

    Raises:
        ConfigError: it is none of these.
    """
    import json

    if isinstance(value, Mapping):
        return value
    text = value
    if not value.lstrip().startswith("{"):
        path = Path(value)
        if not path.is_file():
            raise ConfigError(f"layer_config '{value}' is neither a JSON object nor a file")
        text = path.read_text(encoding="utf-8")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"layer_config is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError('layer_config must be a JSON object: {"layer or pattern": {"bits": 8}}')
    return parsed
