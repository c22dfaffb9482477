"""The quality report of a run: what it lost and what it saved, as `quality.json` and as one HTML page.

Both lie beside the weights, in the folder of each format: a folder that is copied or published takes along what it
cost, with its own format and file sizes. All formats of a run are measured once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.checkpoint import REPORT_FILES
from auto_round.formats import FormatTarget
from auto_round.quality.held_out import hold_out
from auto_round.quality.measure import Measured, measure
from auto_round.quality.page import page
from auto_round.quality.record import record

__all__ = ["Measured", "headline", "hold_out", "measure", "record", "remove_report", "write_report"]

JSON_FILE, HTML_FILE = REPORT_FILES


def write_report(target: FormatTarget, stated: Mapping[str, Any]) -> None:
    """Writes a record as JSON and as a page into the folder of a format."""
    text = json.dumps(stated, indent=1, ensure_ascii=False, allow_nan=False)
    (target.folder / JSON_FILE).write_text(text + "\n", encoding="utf-8")
    (target.folder / HTML_FILE).write_text(page(stated), encoding="utf-8")


def remove_report(folder: Path) -> None:
    """Removes the report on weights that are about to be replaced."""
    for name in REPORT_FILES:
        (folder / name).unlink(missing_ok=True)


def headline(measured: Measured, folder: Path) -> str:
    """Returns the report in one line."""
    found, place = measured.predictions, folder / HTML_FILE
    if found is None:
        return f"quality: not measured on text ({'; '.join(measured.missing)}); {place}"
    return (
        f"quality: perplexity {found.perplexity:.3f} -> {found.quantized_perplexity:.3f}, "
        f"mean KL {found.kl_mean:.4f}, top-1 agreement {100 * found.top1:.1f} %; {place}"
    )
