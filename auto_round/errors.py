"""The exceptions this package raises for its users.

Every message says what was asked, what is allowed and what to do. Several problems found by one check are reported
together. `assert` stays for our own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoRoundError(Exception):
    """Base of all errors of this package."""


class ConfigError(AutoRoundError, ValueError):
    """Bad or contradictory options. Raised before anything is loaded."""


class UnsupportedError(AutoRoundError, ValueError):
    """A format, backend or model cannot do what was asked. The message holds every reason."""


class MissingDependencyError(AutoRoundError, ImportError):
    """An optional package is needed. The message holds the pip line."""


class CheckpointError(AutoRoundError):
    """A checkpoint has missing, truncated or unexpected tensors."""


class VerificationError(AutoRoundError):
    """A checkpoint that was just written is not what was quantized. The message lists every difference."""


class CalibrationError(AutoRoundError):
    """Too little calibration data, or activations that are not finite."""


class ResumeMismatchError(AutoRoundError):
    """The work folder belongs to a run with other options. The message prints what differs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def require(package: str, *, needed_for: str, install: str | None = None) -> None:
    """Checks that an optional package can be imported.

    Raises:
        MissingDependencyError: it cannot; the message names what it is for and the pip line.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(f"{needed_for} needs the package {package}. Run: pip install {install or package}")
