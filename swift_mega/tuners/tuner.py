"""The interface of a tuner, and how the tuner that the settings name is found.

A tuner decides which parameters are trained and what a checkpoint of the run contains. It gets a rank's part of the model after the base
weights were loaded, and never changes them.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import swift_mega.tuners as folder
from swift_mega.config import schema
from swift_mega.discover import choose
from swift_mega.models.build import Held, ModelPart


class Tuner(Protocol):
    """One per run; `attach` is called once, on every rank, before Megatron's DDP wraps the chunks."""

    adapters: bool
    """Whether adapters are added to linears. Norms are then not fused into linears (models/specs.py), so that hooks see their input."""

    def attach(self, part: ModelPart, *, seed: int) -> None:
        """Freezes, adds and initialises parameters. Initial values depend only on seed and names, never on the layout."""
        ...

    def held(self, part: ModelPart) -> Iterator[Held]:
        """This rank's parameters that a checkpoint contains: the whole model, or the added parameters."""
        ...

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        """Contents of PEFT's adapter_config.json; None where a checkpoint is the whole model."""
        ...


def find_tuner(settings: schema.Tuner) -> Tuner:
    """The tuner of type `settings.type`; UserError with the known types where it is unknown."""
    return choose(folder, "TUNER", settings.type, setting="tuner.type")(settings)
