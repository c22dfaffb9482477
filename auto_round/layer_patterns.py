"""Which layers a pattern of `layer_config` or `fp_layers` means: names, parts of names, and places in the model.

A place is `blocks[i:j]` (decoder blocks by number, as Python slices; `blocks[-1]` is the last one),
`blocks[i:j].PATTERN` (the layers in them that PATTERN means), or `non_expert` (layers of blocks that are no routed
experts).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from auto_round.errors import ConfigError
from auto_round.models.base import LinearInfo

NON_EXPERT = "non_expert"
PLACES = ("blocks[0:1]", NON_EXPERT)  # for hints
BLOCKS = re.compile(r"blocks\[\s*(?P<first>-?\d*)\s*(?P<colon>:)?\s*(?P<end>-?\d*)\s*\](?:\.(?P<rest>.+))?")
EXPERT = re.compile(r"\.experts\.\d+\.")


def matching(pattern: str, layers: Sequence[LinearInfo]) -> list[str]:
    """Returns the names of the layers that a pattern means; an exact name is never taken for a place.

    Raises:
        ConfigError: a place that this model does not have, or no valid regular expression.
    """
    names = [layer.name for layer in layers]
    place = BLOCKS.fullmatch(pattern)
    if pattern in names:
        return [pattern]
    if place is not None:
        inside = _in_blocks(place, layers)
        return inside if place["rest"] is None else matches(place["rest"], inside)
    if pattern == NON_EXPERT:
        return _non_experts(layers)
    return matches(pattern, names)


def is_expert(name: str) -> bool:
    """Whether a layer is one of a routed expert."""
    return EXPERT.search(name) is not None


def _in_blocks(place: re.Match[str], layers: Sequence[LinearInfo]) -> list[str]:
    count = 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)
    if place["colon"]:
        ends = (int(place[name]) if place[name] else None for name in ("first", "end"))
        chosen = range(count)[slice(*ends)]
    elif place["first"] and not place["end"]:
        number = int(place["first"])
        chosen = range(count)[number : number + 1 or None] if -count <= number < count else range(0)
    else:
        raise ConfigError("write blocks[2], blocks[0:2] or blocks[-2:]")
    if not chosen:
        raise ConfigError(f"no such blocks: the model has {count}, blocks[0] to blocks[{count - 1}]")
    return [layer.name for layer in layers if layer.block in chosen and not layer.kept]


def _non_experts(layers: Sequence[LinearInfo]) -> list[str]:
    if not any(is_expert(layer.name) for layer in layers):
        raise ConfigError("the model has no routed experts. Name its layers, or give --bits")
    return [layer.name for layer in layers if layer.block is not None and not layer.kept and not is_expert(layer.name)]


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a pattern means, by the first rule that finds any.

    1. the exact name; 2. `re:...` or a text with one of ^ $ \\ + | ( ) { }: a regular expression found anywhere in the
    name; 3. a text with * ? [: a glob over the whole name, else a regular expression; 4. a substring, where a number at
    the end is not continued (layers.1 does not mean layers.10).

    Raises:
        ConfigError: the regular expression is not valid.
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    if pattern.startswith("re:") or re.search(r"[\^$\\+|(){}]", pattern):
        return _regex_matches(pattern.removeprefix("re:"), names)
    if re.search(r"[*?\[]", pattern):
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        return found if found or not _is_regex(pattern) else _regex_matches(pattern, names)
    end = r"(?!\d)" if pattern[-1:].isdigit() else ""
    return [name for name in names if re.search(re.escape(pattern) + end, name)]


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _regex_matches(pattern: str, names: list[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"'{pattern}' is no valid regular expression: {error}") from None
    return [name for name in names if compiled.search(name)]
