"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Made from the record alone (`record.py` says what it holds); every name in it is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.quality.figures import SPACE, change, count, number, share, short_count, size
from auto_round.quality.sections import allocation, block_errors, block_table, layer_errors, layer_table, tuning
from auto_round.quality.style import STYLE

MEANINGS = {
    "Perplexity": "exp of the mean negative log-likelihood of each token of a window but its first.",
    "Mean KL": "mean over positions of KL(16-bit ‖ quantized), the divergence of the token distributions, in nats "
    "(natural logarithm). 0 is no difference. ± is the standard error, from the means of the windows.",
    "Top-1 agreement": "share of positions at which both models find the same token likeliest.",
    "Output error": "‖Y&prime; &minus; Y‖² / ‖Y‖² of a block's output on the held-out text: behind quantized blocks "
    "(what has added up), and behind 16-bit blocks (what the block itself adds).",
    "Loss": "mean squared error of a block's output on calibration text, before tuning (scales searched, rounded to "
    "nearest) and at the kept step. Outputs of blocks differ in size, so losses compare within a block only.",
    "Layer error": "Σ (w &minus; q)² / Σ w²; the weighted one weighs input channels by their mean squares on "
    "the held-out text.",
    "Bits per weight": "codes, scales and zero points, by the scheme; file sizes also count headers and padding.",
}


def page(record: Mapping[str, Any]) -> str:
    """Returns the page of a record."""
    name = html.escape(record["model"]["name"])
    body = [
        _head(record),
        _missing(record["missing"]),
        _tiles(record),
        allocation(record),
        block_errors(record),
        tuning(record),
        layer_errors(record),
        block_table(record),
        layer_table(record),
        _how(record),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Quality report: {name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + f"\n<footer>Made by {html.escape(record['run']['package'])}. "
        "The figures are in <code>quality.json</code> beside this page.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(record: Mapping[str, Any]) -> str:
    run, model = record["run"], record["model"]
    facts = [
        f"{short_count(model['parameters'])} parameters",
        run["scheme"],
        f"format {run['format']}",
        f"{run['options']['iters']} tuning steps a block" if run["options"]["iters"] else "rounding only",
    ]
    return (
        f'<header>\n<p class="kicker">Quality report</p>\n<h1>{html.escape(model["name"])}</h1>\n'
        f'<p class="facts">{html.escape(" · ".join(facts))}</p>\n</header>'
    )


def _missing(reasons: Sequence[str]) -> str:
    return "".join(f'<p class="missing">Not measured: {html.escape(reason)}.</p>\n' for reason in reasons)


def _tiles(record: Mapping[str, Any]) -> str:
    sizes, found = record["size"], record["predictions"]
    tiles = []
    if found is not None:
        before, after = found["perplexity"], found["quantized_perplexity"]
        value = f'{number(before, 4)}<span class="arrow"> → </span>{number(after, 4)}'
        tiles.append(
            _tile("Perplexity, 16-bit → quantized", value, f"{change(before, after)} on held-out text", wide=True)
        )
        error = "" if found["kl_error"] is None else f"± {number(found['kl_error'], 2)}, "
        detail = f"{error}median {number(found['kl_median'], 2)}, 99{SPACE}% below {number(found['kl_p99'], 2)}"
        tiles.append(_tile("Mean KL, nats", number(found["kl_mean"]), detail))
        tiles.append(_tile("Top-1 agreement", share(found["top1"]), f"of {count(found['positions'])} positions"))
    stored = sizes["file_bytes"] or sizes["bytes"]
    part = f"{share(stored / max(sizes['bytes_16bit'], 1))} of the {size(sizes['bytes_16bit'])} in 16 bits"
    tiles.append(_tile("Weight files" if sizes["file_bytes"] else "Weights", size(stored), part))
    bits = number(sizes["block_bits_per_weight"])
    tiles.append(_tile("Bits per weight", bits, f"in blocks; {number(sizes['bits_per_weight'])} over all"))
    return f'<dl class="tiles">\n{"".join(tiles)}</dl>'


def _tile(name: str, value: str, detail: str, *, wide: bool = False) -> str:
    return (
        f'<div class="tile{" wide" if wide else ""}"><dt>{name}</dt><dd class="value">{value}</dd>'
        f'<dd class="detail">{detail}</dd></div>\n'
    )


def _how(record: Mapping[str, Any]) -> str:
    text = record["text"]
    told = f"<p>Held-out text: {html.escape(text)}.</p>" if text else ""
    options = ", ".join(f"{name}={_written(value)}" for name, value in record["run"]["options"].items())
    meanings = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in MEANINGS.items())
    return (
        f"<h2>How this was measured</h2>\n{told}\n<p>Options: <code>{html.escape(options)}</code></p>\n"
        f'<dl class="means">{meanings}</dl>'
    )


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
