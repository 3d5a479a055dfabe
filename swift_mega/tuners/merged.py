"""A model with an adapter merged in, as it is written: the interface between a tuner's files and the writers of export/."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from swift_mega.convert.files.tensors import TensorSource


class Merged(ABC):
    """The tensors of a base, and what the adapter makes of them. Nothing is changed in place: each tensor is merged when it is written."""

    base: TensorSource
    """The tensors to read; their names and shapes are those that are written."""
    dtypes: Mapping[str, torch.dtype]
    """Name -> the dtype in which it is written."""
    changed: Collection[str]
    """Names of the tensors that the adapter changes."""
    config_edits: Mapping[str, Any]
    """Fields of config.json that differ in the merged model."""

    @abstractmethod
    def merged(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged tensor of `changed`, rounded to `dtype`. value: that of the base. UserError where it is not finite."""
