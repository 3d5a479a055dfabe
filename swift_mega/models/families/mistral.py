"""Mistral: the common decoder, every layer with the same sliding window, or none."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate, vary, windows
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return translate(config, windows=windows(config))


FAMILY = dataclasses.replace(
    vary(DECODER, hf_types=("mistral",), translate=_translate),
    reads=READS - {"layer_types"},  # which transformers does not apply to this type
)
