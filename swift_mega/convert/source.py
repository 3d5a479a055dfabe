"""A Hugging Face model as one object: its directory, the settings that config.json gives, its family and its tensors.

A Source is opened once and passed on. Each property is read from disk at its first use, which raises errors in the files, and then cached.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from swift_mega.convert.files.quantised import open_checkpoint
from swift_mega.convert.files.resized import weights_of
from swift_mega.convert.files.tensors import TensorSource
from swift_mega.convert.files.which_files import has_weights
from swift_mega.models.config_json import read_config
from swift_mega.models.family import Family, families, family_of
from swift_mega.models.settings import Settings
from swift_mega.models.translate import load_settings


class Source:
    """dequantize: the dtype in which quantised weights are read; True means float32, False refuses a quantised model.

    names: the names of the model's tensors, for a directory with config.json and no weights.
    A Source can be pickled: another process reads config.json again, and uses the TensorSource that was opened here. The weight files
    must not change in between.
    """

    def __init__(
        self, directory: str | Path, *, dequantize: torch.dtype | bool = False, names: Iterable[str] | None = None
    ) -> None:
        self.directory = Path(directory)
        self.dequantize = torch.float32 if dequantize is True else dequantize or None
        self.names = None if names is None else tuple(names)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("directory", "dequantize", "names", "tensors")
        return {key: value for key, value in self.__dict__.items() if key in kept}

    def open(self) -> None:
        """Reads config and headers now; UserError where they are invalid."""
        _ = self.settings, self.tensors, self.family

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, unchanged."""
        return read_config(self.directory)

    @property
    def is_known(self) -> bool:
        """Whether a family exists for its model_type."""
        return self.config["model_type"] in families()

    @cached_property
    def settings(self) -> Settings:
        """config.json in Megatron's terms; UserError where a field is not understood."""
        return load_settings(self.directory, dequantize=self.dequantize is not None)

    @cached_property
    def tensors(self) -> TensorSource:
        """The weights; UserError where files are missing or invalid."""
        return open_checkpoint(self.directory, self.dequantize)

    @property
    def has_weights(self) -> bool:
        """Whether the directory holds weights."""
        return has_weights(weights_of(self.directory))

    @cached_property
    def family(self) -> Family:
        """The family, with its rules in the names that this model's tensors have: with the family's prefix, or without it."""
        names = self.names
        if names is None:
            names = tuple(self.tensors.entries) if self.has_weights else ()
        return family_of(self.directory).named_like(names)
