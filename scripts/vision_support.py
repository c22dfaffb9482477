"""Writes the table of vision-language families in docs/vision_language.md from what works with tiny models of each.

    python scripts/vision_support.py [FAMILY ...]

takes about eight seconds for each family on one core. Without names the whole table is written anew.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vision_families import FAMILIES  # noqa: E402
from vision_round_trip import PAGE, row, table_row, with_rows  # noqa: E402

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            line = table_row(FAMILIES[name], row(FAMILIES[name], Path(folder)))
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8"), {name: line}), encoding="utf-8")
        print(line, flush=True)
