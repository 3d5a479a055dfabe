"""Full fine-tuning: every parameter of the model is trained, and a checkpoint is the whole model."""

from collections.abc import Iterator

from swift_mega.config import schema
from swift_mega.models.build import ModelPart, NamedParameter
from swift_mega.tuners.tuner import Tuner


class Full(Tuner):
    """Trains everything."""

    Settings = schema.Full

    def attach(self, part: ModelPart, *, seed: int) -> None:
        for chunk in part.chunks:
            chunk.requires_grad_(True)

    def exported(self, part: ModelPart) -> Iterator[NamedParameter]:
        return part.named_parameters()


TUNER = Full
