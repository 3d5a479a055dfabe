"""OLMo 1: LayerNorm without weight or bias; queries, keys and values clamped or not."""

from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family
from swift_mega.models.rules import DENSE_RULES, EMBEDDING_RULES, attention_rules
from swift_mega.models.settings import Biases, NormKind, Scales, Settings

EPSILON = 1e-5
"""Epsilon of every norm; the config has no field for it."""


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    return translate(
        config,
        epsilon=EPSILON,
        megatron={"add_qkv_bias": bias},
        norm=NormKind(kind="layer", weight=False),
        biases=Biases(attention_output=bias),
        scales=Scales(clip=config.clip_qkv),
    )


FAMILY = Family(
    hf_types=("olmo",),
    translate=_translate,
    rules=(*EMBEDDING_RULES, *attention_rules(), *DENSE_RULES),
    reads=(READS - {"rms_norm_eps", "sliding_window", "layer_types"}) | {"attention_bias", "clip_qkv"},
    absent=DECODER.absent,
)
