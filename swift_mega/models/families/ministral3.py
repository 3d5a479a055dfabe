"""Ministral 3, text: Mistral with YaRN, and with a factor on queries that grows with the logarithm of their position."""

import dataclasses
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import vary
from swift_mega.models.families import mistral
from swift_mega.models.settings import Scales, Settings


def _translate(config: Any) -> Settings:
    rope = config.rope_parameters
    slope, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if slope is None or not length:
        raise UserError(
            f"config.json: llama_4_scaling_beta={slope} and original_max_position_embeddings={length} of rope_parameters: queries are "
            "scaled by both; correct them"
        )
    return dataclasses.replace(mistral.FAMILY.translate(config), scales=Scales(query_growth=(slope, length)))


FAMILY = vary(mistral.FAMILY, hf_types=("ministral3",), translate=_translate)
