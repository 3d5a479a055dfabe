"""GLM-4 (2024): GLM-4-0414 without the norms after attention and MLP."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import DECODER
from swift_mega.models.families import glm4
from swift_mega.models.family import Family
from swift_mega.models.rules import EMBEDDING_RULES, FUSED_DENSE_RULES, NORM_RULES, attention_rules
from swift_mega.models.settings import Block, Settings


def _translate(config: Any) -> Settings:
    return dataclasses.replace(glm4.FAMILY.translate(config), block=Block())


FAMILY = Family(
    hf_types=("glm",),
    translate=_translate,
    rules=(*EMBEDDING_RULES, *NORM_RULES, *attention_rules(), *FUSED_DENSE_RULES),
    reads=glm4.FAMILY.reads,
    absent=DECODER.absent,
)
