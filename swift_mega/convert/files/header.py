"""The header of a safetensors file: name, dtype, shape and byte range of every tensor, checked against the file's real size."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from swift_mega.convert.files.spans import Entry
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json, read_object

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""First bytes of torch.save files: zip archives, and pickles (before torch 1.6). Read as a header length, they exceed any file size."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(file: Path) -> tuple[list[Entry], tuple[int, int]]:
    """(entries, `state_of`) of one safetensors file. UserError unless the byte ranges cover the file without gap, overlap or rest."""
    try:
        with file.open("rb") as handle:
            state = state_of(handle.fileno())
            size, _ = state
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            raw = handle.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; copy it from the source again") from None
    if (len(start) < 8 or 8 + length > size) and start.startswith(PICKLES):
        raise UserError(
            f"{file} is a pickle (what torch.save writes), which can run code when read and is refused; convert the model to "
            "safetensors with transformers' save_pretrained first"
        )
    if len(start) < 8 or 8 + length > size:
        raise UserError(
            f"{file} is not a complete safetensors file: {size} bytes, header of {length}; copy it from the source again"
        )
    try:
        header = parse_json(raw, pairs=_once)
        header.pop("__metadata__", None)
        entries = [_entry(name, value, file, 8 + length) for name, value in header.items()]
    except UserError as error:
        raise UserError(f"{file}: {error}; copy it from the source again") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file} has a damaged safetensors header ({error}); copy it from the source again") from None
    _check_cover(file, entries, 8 + length, size)
    return entries, state


def state_of(handle: int) -> tuple[int, int]:
    """(size in bytes, time of last change in ns) of an open file, by which a change is detected."""
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


def _check_cover(file: Path, entries: list[Entry], start: int, size: int) -> None:
    """UserError unless the tensors tile the data, as the format requires; otherwise the file is damaged or was made by another program."""
    reached, before = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != reached:
            kind = "overlaps" if entry.begin < reached else "leaves a gap after"
            raise UserError(
                f"{file}: tensor {entry.name} begins at byte {entry.begin} and {kind} {before}, which ends at {reached}; "
                "copy it from the source again"
            )
        reached, before = entry.end, entry.name
    if reached > size:
        raise UserError(
            f"{file} is truncated: {size} bytes, but {before} ends at {reached}; copy it from the source again"
        )
    if reached < size:
        raise UserError(
            f"{file} has {size - reached} bytes after {before}, which belong to no tensor; copy it from the source again"
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if doubled := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise UserError(f"lists {some(doubled)} twice")
    return dict(pairs)


def _entry(name: str, value: dict[str, Any], file: Path, base: int) -> Entry:
    if value["dtype"] not in DTYPES:
        raise UserError(f"tensor {name} has dtype {value['dtype']}, supported: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    begin, end = value["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise UserError(
            f"tensor {name} has shape {list(shape)} and bytes {begin} to {end}, which are not whole numbers of at least 0"
        )
    if end - begin != dtype.itemsize * math.prod(shape):
        raise UserError(
            f"tensor {name} of shape {list(shape)} and dtype {value['dtype']} does not fit bytes {begin} to {end}"
        )
    return Entry(name, file, dtype, shape, base + begin, base + end)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError where the file is not one or repeats a key."""
    return read_object(path, pairs=_once)


def some(names: Sequence[str], limit: int = 6) -> str:
    """The first `limit` names as text, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
