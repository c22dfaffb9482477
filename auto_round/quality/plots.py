"""Plots as SVG text: lines over blocks, curves, maps of layers, stacked bars.

Nothing is drawn in a colour of its own: classes are coloured by the page's style sheet, in light and in dark. Each plot
has a title that screen readers read, and each mark one that shows where a pointer rests. Text is escaped here.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from auto_round.quality.figures import number

WIDTH, HEIGHT, LOW_HEIGHT = 680, 250, 170
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 36
MOST_MARKS = 16  # labels below an axis
MOST_TICKS = 7
READABLE_SHADE = 0.78  # of a cell on which letters have the page's colour
ROOM_FOR_NUMBER = 36.0  # width of a cell that shows its value
NARROW = 3.0  # columns get no gap below this width


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot.

    Attributes:
        name: for people.
        style: class of its line and points, e.g. "one".
        values: by block; None where there is none.
    """

    name: str
    style: str
    values: Sequence[float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Where values lie on a logarithmic axis, from its lower end at `start` to its upper end at `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Returns the place of a value, which is positive; those beyond an end lie on it."""
        value = min(max(value, self.low), self.high)
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns the values to label: powers of ten, with 2 and 5 between them where there is room."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{step}e{power}") for power in powers for step in steps]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) <= MOST_TICKS:
                break
        return inside[:: -(-len(inside) // MOST_TICKS) or 1]


def log_scale(values: Iterable[float | None], start: float, end: float) -> Scale | None:
    """Returns a scale with some room around all positive values; None if there are none."""
    found = [value for value in values if value is not None and value > 0]
    if not found:
        return None
    low, high = min(found) / 1.25, max(found) * 1.25
    return Scale(low, max(high, low * 2), start, end)


def lines_by_block(title: str, names: Sequence[str], series: Sequence[Series]) -> str:
    """Returns lines over the blocks of a model, values on a logarithmic axis; "" if there is no value."""
    scale = log_scale((value for one in series for value in one.values), HEIGHT - BOTTOM, TOP)
    if scale is None:
        return ""
    step = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
    parts = [*_value_axis(scale), *_block_axis(len(names), step)]
    for one in series:
        places = [
            (LEFT + (index + 0.5) * step, scale.at(value), index, value)
            for index, value in enumerate(one.values)
            if value is not None and value > 0
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline class="line {one.style}" points="{path}"/>')
        radius = 3 if step > 7 else 1.6
        for x, y, index, value in places:
            label = _title(f"{names[index]}: {one.name} {number(value)}")
            parts.append(f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{label}</circle>')
    return _svg(title, WIDTH, HEIGHT, parts)


def curve(title: str, values: Sequence[float], width: int = 150, height: int = 54) -> str:
    """Returns a small curve on a linear axis of its own that starts at zero."""
    top = max(values, default=0.0) or 1.0
    step = width / max(len(values) - 1, 1)
    places = [(index * step, height - 2 - (height - 6) * value / top) for index, value in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    base = f'<line class="axis" x1="0" y1="{height - 1}" x2="{width}" y2="{height - 1}"/>'
    return _svg(title, width, height, [base, f'<polyline class="line two" points="{path}"/>'], stretched=True)


def layer_map(
    title: str,
    kinds: Sequence[str],
    blocks: Sequence[str],
    values: Mapping[tuple[str, int], float],
    words: Callable[[float], str],
) -> str:
    """Returns a map with a row for each kind of layer and a column for each block, the larger the stronger.

    Args:
        values: kind and number of the block -> positive value; shades are logarithmic between the extremes.
        words: what a value is called where a pointer rests.
    """
    scale = log_scale(values.values(), 0.12, 1.0)
    if scale is None:
        return ""
    left, row = 178, 21
    step = (WIDTH - left - RIGHT) / max(len(blocks), 1)
    gap = 1.0 if step > NARROW else 0.0
    parts = []
    for line, kind in enumerate(kinds):
        y = TOP + line * row
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 14}" text-anchor="end">{_shortened(kind)}</text>')
        for index, block in enumerate(blocks):
            value = values.get((kind, index))
            if value is None or value <= 0:
                continue
            place = f'x="{left + index * step:.1f}" y="{y}" width="{step - gap:.1f}" height="{row - 1}"'
            label = _title(f"{block}.{kind}: {words(value)}")
            shade = scale.at(value)
            parts.append(f'<rect class="cell" {place} fill-opacity="{shade:.2f}">{label}</rect>')
            if step >= ROOM_FOR_NUMBER:
                style, middle = "value on" if shade > READABLE_SHADE else "value", left + (index + 0.5) * step
                text = f'<text class="{style}" x="{middle:.1f}" y="{y + 14}" text-anchor="middle">'
                parts.append(f"{text}{number(value, 2)}</text>")
    bottom = TOP + len(kinds) * row
    parts += _block_axis(len(blocks), step, left, bottom)
    return _svg(title, WIDTH, bottom + BOTTOM, parts)


def columns_by_block(
    title: str, names: Sequence[str], parts_of: Sequence[Mapping[str, float]], styles: Mapping[str, str],
    words: Callable[[float], str],
) -> str:  # fmt: skip
    """Returns a column for each block, stacked of its parts in the order of `styles`.

    Args:
        parts_of: for each block, name of a part -> its size.
        styles: name of a part -> class.
        words: what a size is called.
    """
    top = max((sum(parts.values()) for parts in parts_of), default=0)
    if not top:
        return ""
    step, height = (WIDTH - LEFT - RIGHT) / len(names), LOW_HEIGHT
    tall = height - TOP - BOTTOM
    drawn = []
    for part in (0.0, 0.5, 1.0):
        y = height - BOTTOM - part * tall
        drawn.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words(part * top)}</text>')
    gap = min(4.0, step * 0.2) if step > NARROW else 0.0
    for index, (name, parts) in enumerate(zip(names, parts_of, strict=True)):
        y = float(height - BOTTOM)
        for kind, style in styles.items():
            size = tall * parts.get(kind, 0) / top
            if size:
                y -= size
                place = f'x="{LEFT + index * step + gap / 2:.1f}" y="{y:.1f}" width="{step - gap:.1f}"'
                label = _title(f"{name}: {kind}, {words(parts[kind])}")
                drawn.append(f'<rect class="{style}" {place} height="{size:.1f}">{label}</rect>')
    drawn += _block_axis(len(names), step, LEFT, height - BOTTOM)
    return _svg(title, WIDTH, height, drawn)


def stacked_bar(
    title: str, parts: Mapping[str, float], styles: Mapping[str, str], whole: float, words: Callable[[float], str]
) -> str:
    """Returns a horizontal bar of parts, as long against the full width as their sum is against `whole`."""
    height, x, drawn = 26, 0.0, []
    for kind, size in parts.items():
        width = WIDTH * size / max(whole, 1e-9)
        label = _title(f"{kind}: {words(size)}")
        drawn.append(
            f'<rect class="{styles[kind]}" x="{x:.2f}" y="0" width="{max(width - 1, 0.5):.2f}" height="{height}">'
            f"{label}</rect>"
        )
        x += width
    return _svg(title, WIDTH, height, drawn, stretched=True)


def _value_axis(scale: Scale) -> list[str]:
    parts = []
    for value in scale.ticks():
        y = scale.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value, 1)}</text>')
    return parts


def _block_axis(count: int, step: float, left: float = LEFT, bottom: float = HEIGHT - BOTTOM) -> list[str]:
    """Returns numbers of blocks below a plot, and the word for them."""
    every = next(size for size in (1, 2, 5, 10, 20, 50, 100, 1000) if count / size <= MOST_MARKS)
    parts = [
        f'<text class="tick" x="{left + (index + 0.5) * step:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">'
        f"{index}</text>"
        for index in range(0, count, every)
    ]
    middle = left + count * step / 2
    return [*parts, f'<text class="tick" x="{middle:.1f}" y="{bottom + 31:.1f}" text-anchor="middle">block</text>']


def _shortened(text: str, most: int = 27) -> str:
    return html.escape(text if len(text) <= most else "…" + text[1 - most :])


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _svg(title: str, width: float, height: float, parts: Iterable[str], *, stretched: bool = False) -> str:
    fit = ' preserveAspectRatio="none"' if stretched else ""
    label = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}"{fit}>{"".join(parts)}</svg>'
