"""Recipes: options under a name (`best`, `light`), or in a JSON file that people and this package write.

A file is an object of options as on the command line, without dashes, and a `comment`. Options that are given beside a
recipe win over it, each as a whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.config import PARTS, RECIPES, RunConfig
from auto_round.errors import ConfigError, nearest
from auto_round.option_values import parse_layer_config

COMMENT = "comment"


def recipe_options(recipe: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a recipe, by the names of the fields of `config.py`.

    Args:
        recipe: a name in RECIPES, the path of a JSON file, or what such a file holds.
    Raises:
        ConfigError: there is no such recipe, or its content is wrong; all problems are reported together.
    """
    if isinstance(recipe, Mapping):
        return _checked(recipe, "recipe")
    if str(recipe) in RECIPES:
        return dict(RECIPES[str(recipe)])
    path = Path(recipe)
    if not path.is_file():
        names = ", ".join(RECIPES)
        raise ConfigError(f"recipe '{recipe}' is neither one of {names} nor a file.{nearest(str(recipe), RECIPES)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"recipe {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f'recipe {path} must be a JSON object of options: {{"bits": 2, "layer_config": {{...}}}}')
    return _checked(content, f"recipe {path}")


def write_recipe(path: Path, options: Mapping[str, Any], comment: str) -> None:
    """Writes options as a file that `recipe_options` takes."""
    text = json.dumps({COMMENT: comment, **options}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _checked(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {f.name: f for owner in (RunConfig, *PARTS.values()) for f in dataclasses.fields(owner) if f.metadata}
    spellings = {flag.lstrip("-"): name for name, field in fields.items() for flag in field.metadata["flags"]}
    options: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        name = spellings.get(key, key)
        if key == COMMENT:
            continue
        if name not in fields:
            problems.append(f"unknown option '{key}'.{nearest(key, [*fields, *spellings, COMMENT])}")
        elif name in options:
            problems.append(f"option '{name}' is given twice")
        else:
            problems += _why_not_value(fields[name], value)
            options[name] = value
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    if "layer_config" in options:
        options["layer_config"] = parse_layer_config(options["layer_config"])
    return options


def _why_not_value(field: dataclasses.Field, value: Any) -> list[str]:
    """Returns why a JSON value is none of an option, by the type that the command line would give it."""
    kind = bool if field.metadata["off"] else field.metadata["kind"] or type(field.default)
    own: tuple[type, ...] = {float: (float, int), dict: (dict, str)}.get(kind, (kind,))
    if field.name in ("scheme", "dataset"):  # an object of fields, a list of texts: both say what is wrong themselves
        own = (str, dict, list)
    if isinstance(value, own) and (kind is bool or not isinstance(value, bool)):
        return []
    words = " or ".join({"str": "text", "dict": "object", "list": "list"}.get(t.__name__, t.__name__) for t in own)
    return [f"{field.name}={value!r} (allowed: {words})"]
