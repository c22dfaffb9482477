"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with some significant digits: 31.0, 0.0123, 1.23e−5; a dash for None."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    power = math.floor(math.log10(abs(rounded)))
    if -4 <= power < 6:
        text = f"{rounded:,.{max(0, digits - 1 - power)}f}"
    else:
        text = f"{rounded:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return text.replace("-", MINUS)


def count(value: int) -> str:
    """Returns a whole number with its thousands apart."""
    return f"{value:,}"


def short_count(value: float) -> str:
    """Returns a count in thousands, millions or billions: 5.77 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{number(value / size)}{SPACE}{unit}"
    return count(int(value))


def size(value: float | None) -> str:
    """Returns bytes in decimal units: 5.15 MB."""
    if value is None:
        return MISSING
    for unit, unit_size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= unit_size:
            return f"{number(value / unit_size)}{SPACE}{unit}"
    return f"{int(value)}{SPACE}B"


def share(value: float | None, decimals: int = 1) -> str:
    """Returns a part of 1 in per cent."""
    return MISSING if value is None else f"{100 * value:.{decimals}f}{SPACE}%"


def change(before: float | None, after: float | None) -> str:
    """Returns by how much a number grew or fell, in per cent with its sign; a dash where that has no meaning."""
    if before is None or after is None or before <= 0:
        return MISSING
    grown = 100 * (after / before - 1)
    digits = 0 if abs(grown) >= 99.95 else 1
    text = f"{abs(grown):,.{digits}f}{SPACE}%"
    if float(f"{abs(grown):.1f}") == 0:
        return f"0.0{SPACE}%"
    return f"{'+' if grown > 0 else MINUS}{text}"
