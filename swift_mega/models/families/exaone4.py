"""EXAONE 4: norms after attention and MLP and on queries and keys. Where some layers have a sliding window, only those have RoPE."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate, windows
from swift_mega.models.family import Family
from swift_mega.models.rules import DENSE_RULES, EMBEDDING_RULES, POST_NORM_RULES, QK_NORM_RULES, attention_rules
from swift_mega.models.settings import Block, Settings


def _translate(config: Any) -> Settings:
    settings = translate(
        config,
        megatron={"qk_layernorm": True},
        block=Block(pre_norms=False, post_norms=True),
        windows=windows(config),
    )
    if config.sliding_window is None:
        return settings
    ropes = tuple(
        rope if kind == "sliding_attention" else None
        for rope, kind in zip(settings.ropes, config.layer_types, strict=True)
    )
    return dataclasses.replace(settings, ropes=ropes)


FAMILY = Family(
    hf_types=("exaone4",),
    translate=_translate,
    rules=(*EMBEDDING_RULES, *POST_NORM_RULES, *attention_rules(), *QK_NORM_RULES, *DENSE_RULES),
    reads=READS | {"sliding_window_pattern"},
    fixed={"attention_bias": (False,)},
    absent=DECODER.absent,
)
