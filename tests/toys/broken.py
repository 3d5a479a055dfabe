"""Trains layer 0, then a layer that no small model has."""

from swift_mega.config import schema
from swift_mega.tuners.full import Full


class Broken(Full):
    Settings = schema.Tuner

    def trainable(self, step: int) -> tuple[str, ...]:
        return ("decoder.layers.0.*",) if step == 1 else ("decoder.layers.9.*",)


TUNER = Broken
