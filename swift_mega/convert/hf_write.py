"""Safetensors directories, written in place.

Sizes are known first, so that headers are written before any weight, and every process puts what it has where it belongs.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_mega.config.parse import size_in_bytes
from swift_mega.convert.hf_files import NAMES
from swift_mega.convert.spans import BUFFER, MOST, flat, stacked
from swift_mega.errors import UserError

WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)$|.*\.index\.json$|(report|source_dtypes|resized)\.json$"
)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: what it is, and where it goes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def plan_files(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int, stem: str = "model"
) -> dict[str, Planned]:
    """Files and offsets (header included) for `tensors`, in their order; a file holds at most max_bytes, or one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    planned = {}
    for number, names in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        offset = len(header_bytes({name: tensors[name] for name in names}))
        for name in names:
            dtype, shape = tensors[name]
            planned[name] = Planned(dtype, shape, file, offset)
            offset += planned[name].bytes
    return planned


def bytes_needed(planned: Mapping[str, Planned], source: Path | None = None) -> int:
    """On the disk by a plan's files, and by the other files of `source`; JSON that goes with them is not counted."""
    ends: dict[str, int] = {}
    for place in planned.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.bytes)
    return sum(ends.values()) + sum(file.stat().st_size for file in (companions(source) if source else ()))


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a safetensors file that holds `tensors` one after another, with its length, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_headers(directory: Path, planned: Mapping[str, Planned]) -> None:
    """Creates every file of a plan at its full size, header first, and the index where there are several."""
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, tensor in planned.items():
        files.setdefault(tensor.file, {})[name] = (tensor.dtype, tensor.shape)
    for file, tensors in files.items():
        with (directory / file).open("wb") as handle:
            handle.write(header_bytes(tensors))
            handle.truncate(max(planned[name].offset + planned[name].bytes for name in tensors))
    if len(files) > 1:
        total = sum(tensor.bytes for tensor in planned.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: tensor.file for name, tensor in planned.items()},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class Writer:
    """Puts tensors, whole or by rows, where a plan says; any number of processes may do so at once, once the headers are there.

    sharers: processes that do so on this machine. A tensor that this one wrote to its end is read back and hashed while the next
    ones are written.
    """

    def __init__(self, directory: Path, planned: Mapping[str, Planned], *, sharers: int = 1) -> None:
        self.directory, self.planned = directory, planned
        self._buffer = torch.empty(BUFFER, dtype=torch.uint8)
        self._handles: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._digests: dict[str, Future[str]] = {}
        self._pool = ThreadPoolExecutor(hashing_threads(sharers))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        while self._handles:
            os.close(self._handles.popitem()[1])

    def finish(self) -> dict[str, str]:
        """Waits until all that was written is on the disk; returns the sha256 of the tensors written to their end."""
        with ThreadPoolExecutor(1) as disk:
            synced = [disk.submit(os.fsync, handle) for handle in self._handles.values()]
            found = {name: digest.result() for name, digest in self._digests.items()}
            for each in synced:
                each.result()
        return found

    def write(self, name: str, value: Tensor, first_row: int = 0) -> None:
        """`value` is tensor `name` from row `first_row` on; `X[3]` is number 3 of the stacked tensor X."""
        whole, index = stacked(name)
        place = self.planned[whole]
        shape = place.shape if index is None else place.shape[1:]
        assert tuple(value.shape[1:]) == shape[1:], f"{name}: {tuple(value.shape)} planned as {shape}"
        assert not shape or first_row + value.shape[0] <= shape[0], f"{name}: {first_row} + {value.shape} of {shape}"
        begin = place.offset + (index or 0) * place.dtype.itemsize * math.prod(shape)
        begin += first_row * place.dtype.itemsize * math.prod(shape[1:])
        handle = self._handle(place.file)
        numbers = flat(value.detach().contiguous())
        same = numbers.dtype == place.dtype and numbers.device.type == "cpu"
        if same:
            _write_all(handle, numbers, begin)
        for part in () if same else numbers.split(BUFFER // place.dtype.itemsize):
            converted = self._buffer[: part.numel() * place.dtype.itemsize].view(place.dtype)
            begin += _write_all(handle, converted.copy_(part), begin)
        self._note(whole, numbers.numel() * place.dtype.itemsize)

    def _note(self, name: str, size: int) -> None:
        place = self.planned[name]
        self._written[name] = self._written.get(name, 0) + size
        assert self._written[name] <= place.bytes, f"{name} is written twice"
        if self._written[name] == place.bytes:
            self._digests[name] = self._pool.submit(digest, self.directory / place.file, place.offset, place.bytes)

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self.directory / file, os.O_WRONLY)
        return self._handles[file]


def _write_all(handle: int, numbers: Tensor, begin: int) -> int:
    """Returns how many bytes there were."""
    raw = memoryview(numbers.view(torch.uint8).numpy().data) if numbers.numel() else memoryview(b"")
    done = 0
    while done < len(raw):
        done += os.pwrite(handle, raw[done : done + MOST], begin + done)
    return done


def digest(file: Path, begin: int, size: int) -> str:
    """sha256 of `size` bytes of a file."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(BUFFER, max(size, 1))))
    with file.open("rb", buffering=0) as handle:
        while size:
            got = os.preadv(handle.fileno(), [buffer[:size]], begin)
            if not got:
                raise UserError(f"{file} was cut short while it was read; write it again")
            found.update(buffer[:got])
            begin, size = begin + got, size - got
    return found.hexdigest()


def hashing_threads(sharers: int) -> int:
    """For each of the processes that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // sharers)


def copy_companions(source: Path, target: Path) -> None:
    """Everything of a Hugging Face directory but its weights: config, tokenizer, chat template, generation settings."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)


def companions(source: Path) -> Iterator[Path]:
    """The files that `copy_companions` copies."""
    return (file for file in sorted(source.iterdir()) if file.is_file() and not WEIGHTS.match(file.name))


def parse_size(text: str) -> int:
    """Bytes of '500MB', '5GB', '1GiB' or a plain number."""
    size = size_in_bytes(text)
    if size is None:
        raise UserError(f"size {text!r} is not understood; write it like 500MB, 5GB or 2GiB")
    return size
