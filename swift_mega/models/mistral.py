"""Mistral: the common decoder, every layer with the same sliding window, or none."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary, windows
from swift_mega.models.family import Settings


def _translate(config: Any) -> Settings:
    return translate(config, windows=windows(config))


FAMILY = vary(DECODER, hf_types=("mistral",), translate=_translate)
