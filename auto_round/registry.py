"""The one registry class: names to objects, filled by import, read-only afterwards in practice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from auto_round.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects of one kind.

    `kind` is the word used in error messages ("data type", "format", "backend" ...).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Returns a decorator that enters its argument under each of `names`.

        Raises:
            ValueError: a name is taken; nothing is entered.
        """

        def enter(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._entries.update(dict.fromkeys(names, entry))
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """Returns the entry called `name`.

        Raises:
            ConfigError: there is none; the message lists the known names.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ConfigError(f"unknown {self.kind} '{name}'.{nearest(name, self._entries)} Known: {known}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def items(self) -> list[tuple[str, T]]:
        """Returns the (name, entry) pairs in the order of registration."""
        return list(self._entries.items())
