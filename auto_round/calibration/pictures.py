"""Calibration samples with pictures: conversations about image files, through the model's own processor.

Reads LLaVA's records ("image" and "conversations") and Transformers' ("messages" whose contents hold parts of type
"image"), or takes what a processor has made already. The processor and its chat template are the model's; there are no
templates here. Samples of different lengths are padded to one length, so that blocks take them side by side.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.base import CalibrationSet, is_messages
from auto_round.calibration.text import choose_windows
from auto_round.errors import CalibrationError, ConfigError, require

log = logging.getLogger(__name__)

JSON_SUFFIXES = (".json", ".jsonl")
PLACEHOLDER = "<image>"  # stands for the picture in LLaVA's texts
ROLES = {"human": "user", "gpt": "assistant"}
TEXT_INPUTS = ("input_ids", "attention_mask")
NOT_INPUTS = ("labels",)


def has_pictures(dataset: Any) -> bool:
    """Whether a dataset is of pictures: a file of conversations about them, or a list of a processor's outputs."""
    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset).expanduser()
        return path.suffix.lower() in JSON_SUFFIXES and path.is_file() and any(map(_picture_names, _records(path)))
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        beside = [value for name, value in dataset[0].items() if name not in TEXT_INPUTS]
        is_processed = any(isinstance(value, Tensor) and value.is_floating_point() for value in beside)
        return is_processed or any(map(_picture_names, dataset))
    return False


def load_pictures(
    dataset: Any, processor: Any, *, nsamples: int, seqlen: int, seed: int, folder: str | None = None
) -> CalibrationSet:
    """Returns samples with pictures, padded on the right to one more token than the longest has.

    The last token is padding in every sample, so that the model makes a mask for each of them.

    Args:
        dataset: for which `has_pictures` is true.
        processor: of the model; may be None for a processor's outputs.
        nsamples: most samples, chosen by `seed`.
        seqlen: longer samples are left out: cutting them could cut a picture.
        folder: where relative names of pictures begin; by default the folder of the file. "image=DIR" is DIR.
    Raises:
        ConfigError: no processor, or a picture is missing.
        CalibrationError: no sample with a picture is short enough.
        MissingDependencyError: pictures without Pillow.
    """
    is_file = isinstance(dataset, str | os.PathLike)
    records = _records(Path(dataset).expanduser()) if is_file else list(dataset)
    root = _folder(folder) or (Path(dataset).expanduser().parent if is_file else Path())
    processed = "input_ids" in records[0]
    usable = records if processed else [record for record in records if _picture_names(record)]
    if len(usable) < len(records):
        log.info(
            "calibration: %d of %d conversations have no picture and are left out",
            len(records) - len(usable),
            len(records),
        )
    if not processed and processor is None:
        raise ConfigError("calibration with pictures needs the model's processor. Give a model folder that has one")
    samples: list[dict[str, Tensor]] = []
    lengths = []
    for index in choose_windows(len(usable), len(usable), seed).tolist():
        record = usable[index]
        sample = dict(record) if processed else encode(messages_of(record, root), processor)
        lengths.append(sample["input_ids"].shape[-1])
        if lengths[-1] <= seqlen:
            samples.append({name: tensor for name, tensor in sample.items() if name not in NOT_INPUTS})
        if len(samples) == nsamples:
            break
    if not samples:
        raise CalibrationError(f"every sample is longer than seqlen={seqlen}. Raise it to at least {min(lengths)}")
    if len(samples) < nsamples:
        log.warning("calibration: only %d of nsamples=%d samples with pictures", len(samples), nsamples)
    return join_samples(samples)


def join_samples(samples: Sequence[Mapping[str, Tensor]]) -> CalibrationSet:
    """Returns samples, each (1, T) ids and what belongs to it, side by side.

    Whole numbers with one value for each token (kinds of tokens, masks of cross-attention) are padded as the ids are.

    Raises:
        CalibrationError: samples hold different inputs.
    """
    names = list(samples[0])
    other = next((list(sample) for sample in samples if sorted(sample) != sorted(names)), None)
    if other is not None:
        raise CalibrationError(f"samples with different inputs: {', '.join(names)} and {', '.join(other)}")
    width = max(sample["input_ids"].shape[1] for sample in samples) + 1
    ids, masks, media = [], [], []
    for sample in samples:
        length = sample["input_ids"].shape[1]
        filled = {name: _padded(tensor.detach().cpu(), length, width) for name, tensor in sample.items()}
        ids.append(filled["input_ids"].long())
        mask = filled.get("attention_mask")
        masks.append((torch.arange(width) < length)[None] if mask is None else mask.bool())
        media.append({name: tensor for name, tensor in filled.items() if name not in TEXT_INPUTS})
    log.info("calibration: %d samples with pictures, up to %d tokens", len(samples), width - 1)
    return CalibrationSet(torch.cat(ids), torch.cat(masks), tuple(media))


def _padded(tensor: Tensor, length: int, width: int) -> Tensor:
    if tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[1] != length:
        return tensor
    filled = tensor.new_zeros(tensor.shape[0], width, *tensor.shape[2:])
    filled[:, :length] = tensor
    return filled


def encode(messages: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Tensor]:
    """Returns what a processor makes of a conversation, by its own chat template if it has one."""
    if getattr(processor, "chat_template", None) is not None:
        encoded = processor.apply_chat_template(list(messages), tokenize=True, return_dict=True, return_tensors="pt")
    else:
        pictures = [part["image"] for part in _parts(messages) if part["type"] == "image"]
        mark = getattr(processor, "image_token", PLACEHOLDER)
        text = "\n".join(mark if part["type"] == "image" else part["text"] for part in _parts(messages))
        encoded = processor(text=[text], images=pictures, return_tensors="pt")
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor)}


def messages_of(record: Mapping[str, Any], root: Path) -> list[dict[str, Any]]:
    """Returns a record as messages whose pictures are opened."""
    waiting = [_open(name, root) for name in _picture_names(record)]
    messages: list[dict[str, Any]] = []
    for turn in record.get("conversations") or record["messages"]:
        role = turn.get("from") or turn["role"]
        content = turn["value"] if "value" in turn else turn["content"]
        parts: list[dict[str, Any]] = []
        for part in _text_parts(content) if isinstance(content, str) else content:
            is_picture = part["type"] == "image"
            if not is_picture or waiting:  # a mark beyond the last picture is text that says so
                parts.append({"type": "image", "image": waiting.pop(0)} if is_picture else dict(part))
        messages.append({"role": ROLES.get(role, role), "content": parts})
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    first["content"][:0] = [{"type": "image", "image": picture} for picture in waiting]
    return messages


def _text_parts(text: str) -> Iterable[dict[str, str]]:
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            yield {"type": "image"}
        if piece.strip():
            yield {"type": "text", "text": piece.strip()}


def _parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for message in messages for part in message["content"]]


def _picture_names(record: Any) -> list[Any]:
    """Returns the pictures of a record, file names or opened ones, in the order of the text."""
    if not isinstance(record, Mapping):
        return []
    if isinstance(record.get("conversations"), list):
        named = record.get("image") or record.get("images") or []
        return [named] if isinstance(named, str) or not isinstance(named, list) else named
    messages = record.get("messages")
    if not isinstance(messages, list) or not is_messages(messages):
        return []
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content if isinstance(part, Mapping)]
    keys = ("image", "path", "url")
    return [next(part[key] for key in keys if key in part) for part in parts if part.get("type") == "image"]


def _open(name: Any, root: Path) -> Any:
    if not isinstance(name, str | os.PathLike):
        return name
    require("PIL", needed_for="pictures", install="auto-round[vision]")
    from PIL import Image

    path = root / name
    if not path.is_file():
        raise ConfigError(f"no picture {path}. Name the folder that holds them with --extra_data_dir")
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _folder(given: str | None) -> Path | None:
    """Returns the folder of "DIR" or "image=DIR,video=DIR"."""
    if given is None:
        return None
    named = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    folder = Path(named.get("image", given)).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"extra_data_dir '{given}' names no folder of pictures. Write DIR or image=DIR")
    return folder


def _records(path: Path) -> list[Any]:
    try:
        content = path.read_text(encoding="utf-8-sig")
        lines = path.suffix.lower() == ".jsonl"
        parsed = [json.loads(line) for line in content.split("\n") if line.strip()] if lines else json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return []  # the reader of text says what is wrong
    return parsed if isinstance(parsed, list) else [parsed]
