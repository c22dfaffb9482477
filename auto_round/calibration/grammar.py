"""The grammar of dataset strings: `a.json,NeelNanda/pile-10k:num=256:concat=True,mbpp:split=train+test`.

`,` separates datasets, `:` options, `=` a value, `+` several values. A value or a name may be quoted, then it may hold
any of these. A bare word that is no option names splits. Nothing is loaded or looked up here.
"""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.errors import ConfigError, nearest

OPTIONS = ("split", "num", "concat", "apply_chat_template", "system_prompt")
SWITCHES = ("concat", "apply_chat_template")
TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a dataset string.

    Args:
        name: registered name or path of a local file.
        splits: empty for the dataset's default.
        num: how many samples it gives, None for an even share.
        concat: documents are joined and cut into full windows; else each document is one sample.
        apply_chat_template: None lets conversations be rendered when the tokenizer can, and plain text be left alone.
        system_prompt: put before each conversation; implies `apply_chat_template`.
    Raises:
        ConfigError: an empty name, `num` below 1, or a system prompt with `apply_chat_template=False`.
    """

    name: str
    splits: tuple[str, ...] = ()
    num: int | None = None
    concat: bool = True
    apply_chat_template: bool | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a dataset has no name. Give NAME[:option=value...][,NAME...]")
        if self.num is not None and self.num < 1:
            raise ConfigError(f"dataset {self.name}: num={self.num} must be at least 1")
        if self.system_prompt is not None:
            if self.apply_chat_template is False:
                raise ConfigError(f"dataset {self.name}: system_prompt needs the chat template, which is switched off")
            object.__setattr__(self, "apply_chat_template", True)


def parse_datasets(text: str) -> tuple[DatasetSpec, ...]:
    """Returns the datasets that a dataset string names, in order.

    Raises:
        ConfigError: bad grammar, an unknown option, a bad value, or one dataset (and split) named twice.
    """
    specs = tuple(_parse_dataset(part) for part in _split_outside_quotes(text, ","))
    for index, spec in enumerate(specs):
        for earlier in specs[:index]:
            shared = set(spec.splits) & set(earlier.splits)
            if spec.name == earlier.name and (shared or not spec.splits or not earlier.splits):
                raise ConfigError(f"dataset {spec.name} is named twice; give its share of the samples with num=")
    return specs


def _parse_dataset(text: str) -> DatasetSpec:
    name, *options = (part.strip() for part in _split_outside_quotes(text, ":"))
    values: dict[str, str] = {}
    for option in options:
        key, value = _parse_option(_unquote(name), option)
        if key in values:
            raise ConfigError(f"dataset {name}: option {key} is given twice")
        values[key] = value
    name = _unquote(name)
    return DatasetSpec(
        name=name,
        splits=_parse_splits(name, values["split"]) if "split" in values else (),
        num=_parse_int(name, values["num"]) if "num" in values else None,
        concat=_parse_bool(name, "concat", values.get("concat", "true")),
        apply_chat_template=(
            _parse_bool(name, "apply_chat_template", values["apply_chat_template"])
            if "apply_chat_template" in values
            else None
        ),
        system_prompt=values.get("system_prompt"),
    )


def _parse_option(name: str, text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    allowed = f"Options: {', '.join(OPTIONS)}"
    if not key:
        raise ConfigError(f"dataset {name}: an option is empty. {allowed}")
    if equals:
        if key not in OPTIONS:
            raise ConfigError(f"dataset {name}: unknown option '{key}'.{nearest(key, OPTIONS)} {allowed}")
        if not value:
            raise ConfigError(f"dataset {name}: option {key} has no value")
        return key, _unquote(value)
    if key in SWITCHES:
        return key, "true"
    if key in OPTIONS:
        raise ConfigError(f"dataset {name}: option {key} needs a value, as in {key}=...")
    if hint := nearest(key, OPTIONS):
        raise ConfigError(f"dataset {name}: unknown option '{key}'.{hint} A split is also named with split={key}")
    return "split", key


def _parse_splits(name: str, value: str) -> tuple[str, ...]:
    splits = tuple(split.strip() for split in value.split("+"))
    if "" in splits or len(set(splits)) < len(splits):
        raise ConfigError(f"dataset {name}: split={value} must be different names joined by +, as in train+test")
    return splits


def _parse_int(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"dataset {name}: num={value} must be a whole number") from None


def _parse_bool(name: str, key: str, value: str) -> bool:
    if value.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise ConfigError(f"dataset {name}: {key}={value} must be True or False")
    return value.lower() in TRUE_WORDS


def _split_outside_quotes(text: str, separator: str) -> list[str]:
    parts, start, position = [], 0, 0
    while position < len(text):
        if text[position] in "\"'" and text[:position].rstrip()[-1:] in ("", ",", ":", "="):
            position = _closing_quote(text, position)
        elif text[position] == separator:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [*parts, text[start:]]


def _closing_quote(text: str, opening: int) -> int:
    """Returns where the quoted value ends: at a same quote that a separator or the end follows, so `'You're'` works."""
    position = opening
    while (position := text.find(text[opening], position + 1)) >= 0:
        if text[position + 1 :].lstrip()[:1] in ("", ",", ":"):
            return position
    raise ConfigError(f"dataset string: the quote {text[opening:]} is not closed")


def _unquote(value: str) -> str:
    is_quoted = len(value) >= 2 and value[0] in "\"'" and value[-1] == value[0]
    return value[1:-1] if is_quoted else value
