"""Safetensors directories, read by slices.

A checkpoint is its headers: name, dtype, shape and byte range of every tensor, checked against the files before a byte of
weight moves. Pickle files are never opened.
"""

import math
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.spans import Entry, read_spans, spans, stacked
from swift_mega.errors import UserError
from swift_mega.text_files import parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""How files of torch.save begin, of today and of before 1.6. As the length of a header they are longer than any file."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Checkpoint:
    """A Hugging Face directory's tensors, by name; values are read on demand, by slice."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        for file in weight_files(self.directory):
            for entry in read_header(file):
                if entry.name in self.entries:
                    raise UserError(
                        f"tensor {entry.name} is in {self.entries[entry.name].file.name} and again in {file.name} of "
                        f"{self.directory}; delete the file that does not belong to this checkpoint"
                    )
                self.entries[entry.name] = entry
        if not self.entries:
            raise UserError(
                f"the safetensors files of {self.directory} hold no tensor; copy them from the source again"
            )
        self._check_index()
        self._handles: dict[Path, int] = {}

    def _check_index(self) -> None:
        """The index, where there is one, names exactly the tensors that the files hold."""
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            return
        listed: dict[str, str] = read_json(index).get("weight_map", {})
        for name, file in listed.items():
            if name not in self.entries:
                raise UserError(
                    f"{index} lists tensor {name} in {file}, which does not hold it; copy {file} from the source again"
                )
            if self.entries[name].file.name != file:
                raise UserError(
                    f"{index} says tensor {name} is in {file}, but it is in {self.entries[name].file.name}; copy index "
                    "and files again"
                )
        if extra := sorted(self.entries.keys() - listed.keys()):
            raise UserError(f"{index} does not list {some(extra)}, which the files hold; copy index and files again")

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor `name`, or its [start, stop) along `axis`, in memory of its own. `name[3]` is the fourth of a stacked tensor."""
        shape = list(self.shape(name))
        if axis is not None:
            shape[axis] = (shape[axis] if stop is None else stop) - start
        made = torch.empty(shape, dtype=self.entries[stacked(name)[0]].dtype)
        self.read_into(made, name, axis, start, stop)
        return made

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` with what `read` would give: as many numbers in the same order, whatever its shape, strides or dtype."""
        whole, _ = stacked(name)
        entry = self.entries[whole]
        span = spans(entry, name, axis, start, stop)
        assert target.numel() * entry.dtype.itemsize == span.runs * span.length, f"{name}: {span} into {target.shape}"
        try:
            read_spans(self._handle(entry.file), span, entry.dtype, target)
        except EOFError:
            raise UserError(f"{entry.file} was cut short while it was read; copy it from the source again") from None
        except OSError as error:
            raise UserError(f"{entry.file} cannot be read: {error.strerror}; copy it from the source again") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of one of a stacked tensor's."""
        whole, index = stacked(name)
        shape = self.entries[whole].shape
        return shape if index is None else shape[1:]

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            handle = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, handle)
            self._handles[file] = handle
        return self._handles[file]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory; UserError with the reason where there is no usable set."""
    if not directory.is_dir():
        raise UserError(
            f"model directory {directory} does not exist; give the path of a Hugging Face checkpoint directory"
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise UserError(f"{index} has no weight_map; copy it from the source again")
        if odd := sorted({repr(file) for file in listed.values() if not _plain_name(file)}):
            raise UserError(
                f"{index} names {some(odd)}, which is no file of {directory}; copy it from the source again"
            )
        files = sorted({directory / file for file in listed.values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{directory} lacks {some(missing)}, which {index.name} lists; copy the missing files from the source"
            )
        return files
    files = sorted(directory.glob("*.safetensors"))
    numbered = [found for file in files if (found := re.fullmatch(r".*-(\d{5})-of-(\d{5})\.safetensors", file.name))]
    if numbered and len(numbered) != int(numbered[0][2]):
        raise UserError(
            f"{directory} has {len(numbered)} of {int(numbered[0][2])} numbered safetensors files and no index; copy "
            "the missing ones"
        )
    if not files:
        pickles = [file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise UserError(
                f"{directory} holds pickle files only ({some(pickles)}), which can run code when read and are refused; "
                "convert them to safetensors with transformers' save_pretrained first"
            )
        raise UserError(
            f"{directory} holds no *.safetensors file; give the directory of a complete Hugging Face checkpoint"
        )
    return files


def _plain_name(file: object) -> bool:
    return isinstance(file, str) and file != "" and Path(file).name == file


def read_header(file: Path) -> list[Entry]:
    """Entries of one safetensors file, whose ranges cover the file's real size without a hole, an overlap or a rest."""
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
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
            f"{file} is not a whole safetensors file: {size} bytes, header of {length}; copy it from the source again"
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
    return entries


def _check_cover(file: Path, entries: list[Entry], start: int, size: int) -> None:
    """The format asks that tensors tile the data: bytes that belong to none or to two are a damaged file or a foreign one."""
    reached, before = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != reached:
            kind = "overlaps" if entry.begin < reached else "leaves a hole after"
            raise UserError(
                f"{file}: tensor {entry.name} begins at byte {entry.begin} and {kind} {before}, which ends at {reached}; "
                "copy it from the source again"
            )
        reached, before = entry.end, entry.name
    if reached > size:
        raise UserError(
            f"{file} is cut short: {size} bytes, but {before} ends at {reached}; copy it from the source again"
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
        raise UserError(f"tensor {name} has shape {list(shape)} and bytes {begin} to {end}, which are not counts")
    if end - begin != dtype.itemsize * math.prod(shape):
        raise UserError(
            f"tensor {name} of shape {list(shape)} and dtype {value['dtype']} cannot lie in bytes {begin} to {end}"
        )
    return Entry(name, file, dtype, shape, base + begin, base + end)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where it is none."""
    try:
        value = parse_json(path.read_bytes().decode("utf-8-sig"), pairs=_once)
    except UserError as error:
        raise UserError(f"{path}: {error}; copy it from the source again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; copy it from the source again") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it from the source again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object; copy it from the source again")
    return value


def some(names: Sequence[str], limit: int = 6) -> str:
    """At most `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
