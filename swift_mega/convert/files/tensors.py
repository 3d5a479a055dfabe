"""TensorSource: the interface by which all code reads the tensors of a model, by name and by slice.

`hf_files.Checkpoint` reads files. Views read another TensorSource: dequantised (quantised.py), with more vocabulary rows (resized.py),
or with a separate output layer (views.py). Code that loads, checks, converts or merges a model uses only this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swift_mega.convert.files.spans import Entry, stacked


class TensorSource(ABC):
    """The tensors of a model directory; `entries` has their names, shapes and dtypes."""

    directory: Path
    """The directory of config.json and the tokenizer."""
    entries: Mapping[str, Entry]

    @abstractmethod
    def read_into(
        self, target: Tensor, name: str, axis: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        """Fills `target` with the numbers that `read` returns, in order. Its shape, strides and dtype may differ; its size may not."""

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Tensor `name`, or its [start, stop) along dim `axis`, as a new tensor. `name[3]` is index 3 along dim 0 of tensor `name`."""
        shape = list(self.shape(name))
        if axis is not None:
            shape[axis] = (shape[axis] if stop is None else stop) - start
        made = torch.empty(shape, dtype=self.entries[stacked(name)[0]].dtype)
        self.read_into(made, name, axis, start, stop)
        return made

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; of `X[3]`, the shape of X without dim 0."""
        whole, index = stacked(name)
        shape = self.entries[whole].shape
        return shape if index is None else shape[1:]
