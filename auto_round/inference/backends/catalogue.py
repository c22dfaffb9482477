"""The backends there are, those of other packages included.

Another package adds one by an entry point of the group `auto_round.backends` that gives a `Backend`:

    [project.entry-points."auto_round.backends"]
    fast = "their_package.auto_round_backend:BACKEND"
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging

from auto_round.inference.backends.base import BACKENDS, Backend, register_backend

GROUP = "auto_round.backends"

logger = logging.getLogger(__name__)


def all_backends() -> list[Backend]:
    """Returns each backend once, the highest priority on this machine first."""
    _load_entry_points()
    backends = [backend for name, backend in BACKENDS.items() if name == backend.name]
    return sorted(backends, key=lambda backend: -backend.rank())


def backend_named(name: str) -> Backend:
    """Returns the backend with a name or alias.

    Raises:
        ConfigError: there is none; the message lists the known names.
    """
    _load_entry_points()
    return BACKENDS[name]


@functools.cache
def _load_entry_points() -> None:
    """Registers the backends of other packages, once. One that cannot be loaded is reported and left out."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            backend = entry.load()
            if not isinstance(backend, Backend):
                raise TypeError(f"it gives a {type(backend).__name__}, not an auto_round.inference.backends.Backend")
            register_backend(backend)
        # Whatever another package does wrong must not keep a model from loading.
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            logger.warning("backend '%s' of %s is left out: %s: %s", entry.name, package, type(error).__name__, error)
