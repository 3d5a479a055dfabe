"""Trains layers 0 and 3 in turn, with everything else frozen: a tuner outside the package whose trainable set changes."""

from dataclasses import dataclass

from swift_mega.config import schema
from swift_mega.tuners.full import Full

LAYERS = (0, 3)


@dataclass(frozen=True, kw_only=True)
class InTurnSettings(schema.Tuner):
    """Which parameters are trained."""

    type: str = "toys.layers"
    every: int = schema.setting(1, flag="switch_every", help="steps that a layer is trained before the next one")


class InTurn(Full):
    """The optimizer's state starts anew with each turn."""

    Settings = InTurnSettings
    settings: InTurnSettings

    def trainable(self, step: int) -> tuple[str, ...]:
        layer = LAYERS[(step - 1) // self.settings.every % len(LAYERS)]
        return (f"decoder.layers.{layer}.*",)


TUNER = InTurn
