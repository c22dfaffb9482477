"""Sections of the report: what weights became, errors of blocks and layers, losses of tuning; the same as tables."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.quality.figures import MISSING, SPACE, change, number, share, size
from auto_round.quality.plots import Series, columns_by_block, curve, layer_map, lines_by_block, stacked_bar

Record = Mapping[str, Any]
COLOURS = 7  # of types of weights in the style sheet; further types share the last one
TIMES = f"{SPACE}\N{MULTIPLICATION SIGN}{SPACE}"
KEPT = re.compile(r"\d+-bit$")


def allocation(record: Record) -> str:
    """Returns what weights became: bytes by type, whole model and block by block, and bits by layer if they differ."""
    sizes, styles = record["size"], _styles(record)
    whole = max(sizes["bytes_16bit"], sizes["bytes"])
    parts = {own["type"]: own["bytes"] for own in sizes["types"]}
    parts = {kind: parts[kind] for kind in styles if kind in parts}
    words = {
        own["type"]: f"{own['type']}: {size(own['bytes'])}, {share(own['bytes'] / max(sizes['bytes'], 1), 0)}"
        for own in sizes["types"]
    }
    original = stacked_bar("Weights in 16 bits", {"16-bit": sizes["bytes_16bit"]}, {"16-bit": "kept"}, whole, size)
    quantized = stacked_bar("Quantized weights by type", parts, styles, whole, size)
    bars = (
        f'<figure class="bar"><figcaption><span>16-bit</span><span>{size(sizes["bytes_16bit"])}</span></figcaption>'
        f'{original}</figure>\n<figure class="bar"><figcaption><span>quantized</span><span>{size(sizes["bytes"])}, '
        f"{share(sizes['bytes'] / max(sizes['bytes_16bit'], 1))}</span></figcaption>{quantized}</figure>"
    )
    blocks = record["blocks"]
    inside = [_bytes_by_type(record, block["names"]) for block in blocks]
    used = {kind: style for kind, style in styles.items() if any(kind in own for own in inside)}
    columns = columns_by_block("Bytes of each block by type", [b["name"] for b in blocks], inside, used, size)
    shown = f"<h3>Bytes by block</h3>{_figure(columns)}" if columns else ""
    return f"<h2>What the weights became</h2>\n{bars}\n{_key(words, styles)}\n{shown}\n{_bits_map(record)}"


def block_errors(record: Record) -> str:
    """Returns the section on errors of block outputs, "" if there are none."""
    blocks = record["blocks"]
    series = [
        Series("behind quantized blocks", "two", [block["output_error"] for block in blocks]),
        Series("behind 16-bit blocks", "three", [block["own_error"] for block in blocks]),
    ]
    plot = lines_by_block("Relative error of each block's output", [block["name"] for block in blocks], series)
    if not plot:
        return ""
    return (
        "<h2>Error of block outputs</h2>\n<p>How far each block's output on the held-out text is from that of the "
        "16-bit model, squared and relative: with everything before it quantized, and by itself.</p>\n"
        f"{_key_of(series)}\n{_figure(plot)}"
    )


def tuning(record: Record) -> str:
    """Returns the section on losses before and after tuning and their curves, "" for a run without tuning."""
    blocks = record["blocks"]
    series = [
        Series("before tuning", "one", [block["loss_before"] for block in blocks]),
        Series("after", "two", [block["loss_after"] for block in blocks]),
    ]
    plot = lines_by_block("Loss of each block before and after tuning", [block["name"] for block in blocks], series)
    if not plot:
        return ""
    curves = "".join(_curve(block) for block in blocks if block["loss_curve"])
    told = (
        f'<h3>Loss over the steps</h3><p class="note">One curve a block, each on a scale of its own from zero; every '
        f'point is {_steps(blocks)}.</p><ul class="curves">{curves}</ul>'
    )
    return (
        "<h2>Tuning</h2>\n<p>Mean squared error of each block's output on the same calibration samples, with the "
        f"searched rounding and at the kept step.</p>\n{_key_of(series)}\n{_figure(plot)}\n{told if curves else ''}"
    )


def layer_errors(record: Record) -> str:
    """Returns the map of layer errors, "" if there are none."""
    weighted = any(layer["weighted_error"] is not None for layer in record["layers"])
    field = "weighted_error" if weighted else "weight_error"
    kinds, values = _by_kind(record, field)
    names = [block["name"] for block in record["blocks"]]
    plot = layer_map("Error of each layer's weight by block", kinds, names, values, number)
    if not plot:
        return ""
    low, high = min(values.values()), max(values.values())
    what = "weighted by the squares of the layer's inputs" if weighted else "not weighted, as no text was run"
    return (
        f"<h2>Error of layers</h2>\n<p>Squared error of each weight, relative, {what}. Faintest {number(low, 2)}, "
        f"strongest {number(high, 2)}; experts of a list are averaged.</p>\n{_figure(plot)}"
    )


def block_table(record: Record) -> str:
    """Returns every block as a table."""
    heading = ("Block", "Size", "Bits", "Loss before", "after", "change", "Output error", "own error", "Kept step")
    rows = []
    for block in record["blocks"]:
        before, after = block["loss_before"], block["loss_after"]
        kept = MISSING if block["kept_step"] is None else f"{block['kept_step']} of {block['steps']}"
        cells = [size(block["bytes"]), number(block["bits_per_weight"]), number(before), number(after)]
        cells += [change(before, after), number(block["output_error"]), number(block["own_error"]), kept]
        rows.append(_row(" + ".join(block["names"]), cells, [block["note"]]))
    return _table("All blocks", heading, rows, ["Note"])


def layer_table(record: Record) -> str:
    """Returns every layer as a table; experts of a list that became the same are one row."""
    heading = ("Layer", "Shape", "Bits", "Size", "Error", "Weighted error")
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for layer in record["layers"]:
        groups.setdefault((_without_expert(layer["name"]), layer["type"], layer["why"]), []).append(layer)
    rows = []
    for (name, kind, why), layers in groups.items():
        first = layers[0]
        shape = TIMES.join(map(str, first["shape"]))
        shape = shape if len(layers) == 1 else f"{len(layers)} of {shape}"
        cells = [shape, number(first["bits_per_weight"]), size(sum(layer["bytes"] for layer in layers))]
        cells += [_mean(layers, "weight_error"), _mean(layers, "weighted_error")]
        rows.append(_row(name if len(layers) > 1 else first["name"], cells, [kind, why]))
    return _table("All layers", heading, rows, ["Became", "Why"])


def _curve(block: Mapping[str, Any]) -> str:
    told = change(block["loss_before"], block["loss_after"])
    drawn = curve(f"Loss of {block['name']} over {block['steps']} steps", block["loss_curve"])
    return f'<li><h3>{_breakable(block["name"])}</h3>{drawn}<span class="detail">{told}</span></li>'


def _steps(blocks: Sequence[Mapping[str, Any]]) -> str:
    found = {block["steps_per_point"] for block in blocks if block["steps_per_point"]}
    if found == {1}:
        return "one step"
    return f"the mean of {min(found)} steps" if len(found) == 1 else "the mean of a few steps"


def _styles(record: Record) -> dict[str, str]:
    """Returns class by type of weights, quantized ones first in the order of their bytes."""
    kinds = [own["type"] for own in record["size"]["types"]]
    quantized = [kind for kind in kinds if not KEPT.match(kind)]
    styles = {kind: f"t{min(index, COLOURS - 1)}" for index, kind in enumerate(quantized)}
    return styles | {kind: "kept" for kind in kinds if KEPT.match(kind)}


def _bytes_by_type(record: Record, names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for layer in record["layers"]:
        if layer["block"] in names:
            found[layer["type"]] = found.get(layer["type"], 0) + layer["bytes"]
    return found


def _bits_map(record: Record) -> str:
    """Returns bits by layer and block where they differ."""
    kinds, values = _by_kind(record, "bits_per_weight")
    if len({round(value, 2) for value in values.values()}) < 2:
        return ""
    names = [block["name"] for block in record["blocks"]]
    plot = layer_map("Bits per weight of each layer by block", kinds, names, values, lambda bits: f"{bits:.2f} bits")
    low, high = min(values.values()), max(values.values())
    told = f"Faintest {low:.2f} bits per weight, strongest {high:.2f}."
    return f'<h3>Bits by layer</h3><p class="note">{told}</p>{_figure(plot)}'


def _by_kind(record: Record, field: str) -> tuple[list[str], dict[tuple[str, int], float]]:
    """Returns kinds of layers in blocks, and the mean of a field by kind and number of the group of blocks."""
    group_of = {name: index for index, block in enumerate(record["blocks"]) for name in block["names"]}
    found: dict[tuple[str, int], list[float]] = {}
    for layer in record["layers"]:
        if layer["block"] in group_of and layer[field] is not None:
            kind = _without_expert(layer["name"].removeprefix(layer["block"] + "."))
            found.setdefault((kind, group_of[layer["block"]]), []).append(layer[field])
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    return kinds, {key: sum(values) / len(values) for key, values in found.items()}


def _without_expert(name: str) -> str:
    """Returns a name with the number of an expert left out."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", name)


def _mean(layers: Sequence[Mapping[str, Any]], field: str) -> str:
    found = [layer[field] for layer in layers if layer[field] is not None]
    return number(sum(found) / len(found)) if found else MISSING


def _figure(plot: str) -> str:
    # A region that scrolls has to be reachable by keyboard.
    return f'<figure class="scroll" tabindex="0" role="group" aria-label="Plot">{plot}</figure>'


def _key(words: Mapping[str, str], styles: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><i class="{style}"></i>{html.escape(words[kind])}</li>' for kind, style in styles.items() if kind in words
    )
    return f'<ul class="key">{items}</ul>'


def _key_of(series: Sequence[Series]) -> str:
    return _key({one.name: one.name for one in series}, {one.name: one.style for one in series})


def _breakable(name: str) -> str:
    return html.escape(name).replace(".", ".<wbr>")


def _row(name: str, cells: Sequence[str], texts: Sequence[str]) -> str:
    """Returns a row: cells are written as they are, texts are escaped, the last one may be long."""
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    *short, last = (html.escape(text) for text in texts)
    told = "".join(f'<td class="text">{text}</td>' for text in short) + f'<td class="text wrap">{last}</td>'
    return f'<tr><th scope="row">{html.escape(name)}</th>{values}{told}</tr>'


def _table(title: str, heading: Sequence[str], rows: Sequence[str], texts: Sequence[str]) -> str:
    first, *others = heading
    head = f'<th scope="col" class="text">{first}</th>' + "".join(f'<th scope="col">{name}</th>' for name in others)
    head += "".join(f'<th scope="col" class="text">{name}</th>' for name in texts)
    return (
        f"<details><summary>{title}{SPACE}({len(rows)})</summary>\n"
        f'<div class="scroll" tabindex="0" role="group" aria-label="{title}"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
