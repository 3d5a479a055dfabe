"""Mistral: the common decoder with the same sliding window in every layer, or with none."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate, vary, windows
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return translate(config, windows=windows(config))


FAMILY = dataclasses.replace(
    vary(DECODER, hf_types=("mistral",), translate=_translate),
    reads=READS - {"layer_types"},  # transformers does not apply it to this type
)
