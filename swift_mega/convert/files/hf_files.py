"""Safetensors directories, read by slices.

All headers are read first: name, dtype, shape and byte range of every tensor. They are checked against the file sizes and the index
before any weight is read. Pickle files are never opened.
"""

import os
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor

from swift_mega.convert.files.header import DTYPES, NAMES, read_header, read_json, some, state_of
from swift_mega.convert.files.spans import Entry, read_spans, spans, stacked
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import stem_of, weight_files
from swift_mega.errors import UserError

__all__ = ["DTYPES", "NAMES", "Checkpoint", "Entry", "read_json", "some"]


class Checkpoint(TensorSource):
    """The safetensors files of a Hugging Face directory; values are read on demand, by slice.

    stem: how the file names begin, one of the constants in which_files.py; default: a model's, or an adapter's in a directory that
    contains only a PEFT adapter.
    A Checkpoint can be pickled: another process opens the files again, and raises UserError where a file changed since its header was read.
    """

    def __init__(self, directory: str | Path, *, stem: str | None = None) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        found = weight_files(self.directory, stem or stem_of(self.directory))
        for file in found.files:
            entries, self._states[file] = read_header(file)
            for entry in entries:
                if entry.name in self.entries:
                    raise UserError(
                        f"tensor {entry.name} is in {self.entries[entry.name].file.name} and again in {file.name} of "
                        f"{self.directory}; delete the file that does not belong to this checkpoint"
                    )
                self.entries[entry.name] = entry
        if not self.entries:
            raise UserError(
                f"the safetensors files of {self.directory} have no tensor; copy them from the source again"
            )
        if found.index is not None:
            self._check_index(found.index)
        self._handles: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor has no meaning in another process.
        return {**self.__dict__, "_handles": {}}

    def _check_index(self, index: Path) -> None:
        """UserError unless the index names exactly the tensors in the files."""
        listed: dict[str, str] = read_json(index).get("weight_map", {})
        for name, file in listed.items():
            if name not in self.entries:
                raise UserError(
                    f"{index} lists tensor {name} in {file}, which does not hold it; copy {file} from the source again"
                )
            if self.entries[name].file != self.directory / file:
                raise UserError(
                    f"{index} says tensor {name} is in {file}, but it is in {self.entries[name].file.name}; copy index "
                    "and files again"
                )
        if extra := sorted(self.entries.keys() - listed.keys()):
            raise UserError(f"{index} does not list {some(extra)}, which the files hold; copy index and files again")

    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` from the file."""
        whole, _ = stacked(name)
        entry = self.entries[whole]
        span = spans(entry, name, axis, start, stop)
        assert target.numel() * entry.dtype.itemsize == span.runs * span.length, f"{name}: {span} into {target.shape}"
        try:
            read_spans(self._handle(entry.file), span, entry.dtype, target)
        except EOFError:
            raise UserError(f"{entry.file} was truncated while it was read; copy it from the source again") from None
        except OSError as error:
            raise UserError(f"{entry.file} cannot be read: {error.strerror}; copy it from the source again") from None

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            handle = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, handle)
            if state_of(handle) != self._states[file]:
                raise UserError(f"{file} has changed since its header was read; start again when nothing writes to it")
            self._handles[file] = handle
        return self._handles[file]
