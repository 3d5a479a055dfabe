"""Full fine-tuning: every parameter of the model is trained, and a checkpoint is the whole model."""

from collections.abc import Iterator
from typing import Any

from swift_mega.config import schema
from swift_mega.models.build import Held, ModelPart


class Full:
    """Trains everything."""

    adapters = False

    def __init__(self, settings: schema.Tuner) -> None:
        self.settings = settings

    def attach(self, part: ModelPart, *, seed: int) -> None:
        for chunk in part.chunks:
            chunk.requires_grad_(True)

    def held(self, part: ModelPart) -> Iterator[Held]:
        return part.held()

    def adapter_config(self, part: ModelPart, base: str) -> dict[str, Any] | None:
        return None


TUNER = Full
