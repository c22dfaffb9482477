"""Reads calibration documents from local .json, .jsonl and .txt files, without the package `datasets`.

A text file is one document. A JSON file holds strings, records with "text", records with "messages" or records with a
single field. This file knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.calibration.base import Document, document_of, is_messages
from auto_round.errors import CalibrationError, ConfigError

SUFFIXES = (".json", ".jsonl", ".txt")


def check_path(path: Path) -> None:
    """Checks that `path` is a file this module reads.

    Raises:
        ConfigError: it is missing, a directory, or of another kind.
    """
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        raise ConfigError(f"dataset {path} is a directory. Name one file of it ({kinds})")
    if not path.is_file():
        raise ConfigError(f"dataset file {path} does not exist (working directory: {Path.cwd()})")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"dataset file {path} ends in '{path.suffix}'. Local files must be {kinds}")


def read_documents(path: Path) -> list[Document]:
    """Returns the documents of a local file, in its order.

    Raises:
        ConfigError: see `check_path`.
        CalibrationError: the content is not UTF-8, not JSON, or has no text; the message says where.
    """
    check_path(path)
    is_text = path.suffix.lower() == ".txt"
    try:
        # A byte order mark is no JSON; in a text file it is part of the text, as it is for a tokenizer.
        content = path.read_text(encoding="utf-8" if is_text else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error}") from error
    if is_text:
        return [content]
    records = _records_of_lines(path, content) if path.suffix.lower() == ".jsonl" else _records_of_json(path, content)
    if not records:
        raise CalibrationError(f"{path} holds no records")
    return [_document(record, f"{path}, {place}") for place, record in records]


def _records_of_lines(path: Path, content: str) -> list[tuple[str, Any]]:
    records = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                records.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                message = f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})"
                raise CalibrationError(message) from error
    return records


def _records_of_json(path: Path, content: str) -> list[tuple[str, Any]]:
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        hint = ". A file with one record a line is .jsonl" if error.msg == "Extra data" else ""
        message = f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}){hint}"
        raise CalibrationError(message) from error
    return [(f"record {index}", record) for index, record in enumerate(_records(parsed))]


def _records(parsed: Any) -> list[Any]:
    """Returns the records of a whole JSON file: a list, one record, a column of texts, or texts under keys."""
    if isinstance(parsed, list):
        return parsed
    if not isinstance(parsed, Mapping):
        return [parsed]
    column = parsed.get("text")
    if len(parsed) == 1:
        column = next(iter(parsed.values()))
    is_conversation = isinstance(column, list) and is_messages(column)
    if isinstance(column, list) and not is_conversation:
        return column
    if "text" not in parsed and "messages" not in parsed and all(isinstance(value, str) for value in parsed.values()):
        return list(parsed.values())
    return [parsed]


def _document(record: Any, place: str) -> Document:
    if isinstance(record, Mapping):
        if (document := document_of(record)) is not None:
            return document
        keys = ", ".join(map(str, record)) or "none"
        raise CalibrationError(
            f'{place}: no usable text. Give a string "text" or a list "messages" (each with role and content), '
            f"or a single field with a string; keys seen: {keys}"
        )
    if isinstance(record, str) or is_messages(record):
        return record
    raise CalibrationError(f'{place}: a record must be a string, or an object with "text", not {record!r:.60}')
