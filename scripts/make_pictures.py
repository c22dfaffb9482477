"""Makes a small set of pictures with conversations about them, in LLaVA's form, to try calibration with pictures.

    python scripts/make_pictures.py FOLDER [COUNT]

writes FOLDER/conversations.json and FOLDER/pictures/*.png: one square or disc of one colour on a ground of another.
PNG is written here, so that nothing but Python is needed.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 210, 40)}
SHAPES = ("square", "disc")
SIDE = 64


def png(rows: list[list[tuple[int, int, int]]]) -> bytes:
    """Returns an 8-bit RGB PNG of rows of colours."""
    raw = b"".join(b"\0" + bytes(value for colour in row for value in colour) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def picture(shape: str, colour: str, ground: str, size: int) -> bytes:
    """Returns a PNG of a shape in the middle."""
    middle, half = SIDE / 2 - 0.5, size / 2

    def inside(x: int, y: int) -> bool:
        across, down = abs(x - middle), abs(y - middle)
        return max(across, down) <= half if shape == "square" else across**2 + down**2 <= half**2

    return png([[COLOURS[colour if inside(x, y) else ground] for x in range(SIDE)] for y in range(SIDE)])


def conversation(index: int) -> tuple[dict, bytes]:
    """Returns a record and its picture."""
    names = list(COLOURS)
    colour, ground = names[index % 4], names[(index + 1 + index // 8) % 4]
    ground = ground if ground != colour else names[(index + 2) % 4]
    shape, size = SHAPES[index // 4 % 2], 16 + 4 * (index % 7)
    question = (
        "What is in the middle of the picture?" if index % 2 else "Which shape do you see, and what colour is it?"
    )
    record = {
        "id": str(index),
        "image": f"{index:03d}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": f"A {colour} {shape} on a {ground} ground" + ", a large one." * (size > 28)},
        ],
    }
    return record, picture(shape, colour, ground, size)


def write_pictures(folder: Path, count: int = 16) -> Path:
    """Writes pictures and conversations; returns the file of conversations."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        record, data = conversation(index)
        (folder / "pictures" / record["image"]).write_bytes(data)
        records.append(record)
    file = folder / "conversations.json"
    file.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(write_pictures(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16))
