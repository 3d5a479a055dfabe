"""What holds tensors by name, and gives slices of them: files, or a view of files.

Who loads, checks, converts or merges a model knows only this. Files are hf_files.Checkpoint; views read another source: dequantised
(quantised.py), with more rows (resized.py), with an output layer of its own (views.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swift_mega.convert.files.spans import Entry, stacked


class TensorSource(ABC):
    """Tensors of a model's directory, by the names, shapes and dtypes that `entries` says."""

    directory: Path
    """Where config.json and the tokenizer are."""
    entries: Mapping[str, Entry]

    @abstractmethod
    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` with what `read` gives: as many numbers in the same order, whatever its shape, strides or dtype."""

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor `name`, or its [start, stop) along `axis`, in memory of its own. `name[3]` is the fourth of a stacked tensor."""
        shape = list(self.shape(name))
        if axis is not None:
            shape[axis] = (shape[axis] if stop is None else stop) - start
        made = torch.empty(shape, dtype=self.entries[stacked(name)[0]].dtype)
        self.read_into(made, name, axis, start, stop)
        return made

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of one of a stacked tensor's."""
        whole, index = stacked(name)
        shape = self.entries[whole].shape
        return shape if index is None else shape[1:]
