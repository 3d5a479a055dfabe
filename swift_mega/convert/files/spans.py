"""Byte ranges of tensor slices: which bytes of a file a slice is, and how to read them without reading the whole tensor.

A slice along dim 0 is one run of bytes; along a later dim it is many runs with a stride. A run is read straight into the target where
the dtypes are equal, else through a small buffer. Short runs are read together with the bytes between them, which are dropped:
one long read costs a shared file system less than thousands of short ones.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BUFFER = 8 << 20
"""Bytes of the buffer through which numbers of another dtype are converted."""
SHORT = 256 << 10
"""Runs of fewer bytes than this are read together with their neighbours."""
MOST = 1 << 30
"""Most bytes of one read or write call; Linux transfers at most 2 GiB per call."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor: bytes [begin, end) of `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Span:
    """`runs` runs of `length` bytes each; run i begins at byte begin + i * stride of the file."""

    begin: int
    length: int
    stride: int
    runs: int

    @property
    def bytes(self) -> int:
        """Bytes that are needed."""
        return self.length * self.runs

    @property
    def bytes_read(self) -> int:
        """Bytes that are read, including those between short runs."""
        if self.runs == 1 or self.length >= SHORT:
            return self.bytes
        return (self.runs - 1) * self.stride + self.length


def stacked(name: str) -> tuple[str, int | None]:
    """Parses a tensor name as rules write it. `X[3]`, index 3 along dim 0 of X, gives (X, 3); any other name gives (name, None)."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, None)


def spans(entry: Entry, name: str, axis: int | None, start: int, stop: int | None) -> Span:
    """The bytes of `name` (the entry's name, or `X[3]`) from `start` to `stop` along dim `axis`."""
    shape, begin = entry.shape, entry.begin
    _, index = stacked(name)
    if index is not None:
        shape = shape[1:]
        begin += index * entry.dtype.itemsize * math.prod(shape)
    if axis is None or not shape:
        size = entry.dtype.itemsize * math.prod(shape)
        return Span(begin, size, size, 1)
    stop = shape[axis] if stop is None else stop
    inner = entry.dtype.itemsize * math.prod(shape[axis + 1 :])
    runs, length, stride = math.prod(shape[:axis]), (stop - start) * inner, shape[axis] * inner
    if length == stride:  # the whole dim: one run
        runs, length, stride = 1, runs * length, runs * length
    return Span(begin + start * inner, length, stride, runs)


def read_spans(handle: int, span: Span, dtype: torch.dtype, target: Tensor) -> None:
    """Fills `target`, of any dtype, strides and device, with the span's numbers in order. EOFError where the file is too short."""
    if not target.numel():
        return
    if not target.is_contiguous():
        _read_rows(handle, span, dtype, target)
    elif span.runs > 1 and span.length < SHORT:
        _read_between(handle, span, dtype, flat(target))
    else:
        size = target.numel() // span.runs
        for run, part in enumerate(flat(target).split(size)):
            _read_run(handle, span.begin + run * span.stride, dtype, part)


def _read_rows(handle: int, span: Span, dtype: torch.dtype, target: Tensor) -> None:
    """Fills a target that is not contiguous: each of its contiguous blocks (its last dims, as many as are contiguous) separately."""
    first = _contiguous_from(target)
    if span.runs > 1 or first == target.dim():
        whole = torch.empty(target.shape, dtype=dtype)
        read_spans(handle, span, dtype, whole)
        target.copy_(whole)
        return
    size = math.prod(target.shape[first:])
    for number in range(target.numel() // size):
        row, rest = target, number
        for dim in reversed(range(first)):
            rest, index = divmod(rest, target.shape[dim])
            row = row.select(dim, index)
        _read_run(handle, span.begin + number * size * dtype.itemsize, dtype, flat(row))


def _contiguous_from(target: Tensor) -> int:
    """The first dim d such that dims d, d+1, … of the target are contiguous."""
    size, first = 1, target.dim()
    for dim in reversed(range(target.dim())):
        if target.shape[dim] != 1 and target.stride(dim) != size:
            break
        size, first = size * target.shape[dim], dim
    return first


def _read_run(handle: int, begin: int, dtype: torch.dtype, target: Tensor) -> None:
    """Reads one run of bytes into a contiguous target."""
    if target.dtype == dtype and target.device.type == "cpu":
        _fill(handle, begin, target)
        return
    count = BUFFER // dtype.itemsize
    buffer = torch.empty(min(count, target.numel()), dtype=dtype)
    for part in target.split(count):
        _fill(handle, begin, buffer[: part.numel()])
        part.copy_(buffer[: part.numel()])
        begin += part.numel() * dtype.itemsize


def _read_between(handle: int, span: Span, dtype: torch.dtype, target: Tensor) -> None:
    """Reads many short runs: reads whole strides into a buffer, and copies the runs out of it."""
    together = max(1, BUFFER // span.stride)
    buffer = torch.empty(together * span.stride // dtype.itemsize, dtype=dtype)
    size, stride = span.length // dtype.itemsize, span.stride // dtype.itemsize
    for first in range(0, span.runs, together):
        runs = min(together, span.runs - first)
        needed = (runs - 1) * stride + size  # not runs * stride: the last stride may end beyond the file
        _fill(handle, span.begin + first * span.stride, buffer[:needed])
        picked = buffer.as_strided((runs, size), (stride, 1))
        target[first * size : (first + runs) * size].view(runs, size).copy_(picked)


def flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor as a view [numbers] with stride 1. `view` does not guarantee the stride for a single number."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _fill(handle: int, begin: int, target: Tensor) -> None:
    raw = memoryview(target.view(torch.uint8).numpy().data)
    done = 0
    while done < len(raw):
        got = os.preadv(handle, [raw[done : done + MOST]], begin + done)
        if not got:
            raise EOFError
        done += got
