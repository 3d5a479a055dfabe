"""What a tuner is, and how the one that the settings name is found.

A tuner decides which parameters are trained and what a checkpoint of the run is. It sees a rank's part of the model after the
base weights are in it; it never changes them.
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
    """Whether linears are extended, and so must show their real input (models/specs.py)."""

    def attach(self, part: ModelPart, *, seed: int) -> None:
        """Freezes, adds and initialises; initial values depend on the seed and the names, never on the layout."""
        ...

    def held(self, part: ModelPart) -> Iterator[Held]:
        """This rank's exported parameters: the whole model, or what was added."""
        ...

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        """PEFT's adapter_config.json, or None where a checkpoint is the whole model."""
        ...


def find_tuner(settings: schema.Tuner) -> Tuner:
    """The tuner of `settings.type`; UserError with the known ones."""
    return choose(folder, "TUNER", settings.type, setting="tuner.type")(settings)
