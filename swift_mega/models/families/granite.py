"""Granite: the common decoder with constant factors on embeddings, attention scores, residual branches and logits."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.settings import Biases, Block, Scales, Settings


def _translate(config: Any) -> Settings:
    attention, mlp = bool(config.attention_bias), bool(getattr(config, "mlp_bias", False))
    return translate(
        config,
        megatron={"add_qkv_bias": attention, "softmax_scale": config.attention_multiplier},
        biases=Biases(attention_output=attention, mlp=mlp),
        block=Block(residual_multiplier=config.residual_multiplier),
        scales=Scales(embedding=config.embedding_multiplier, logits=1 / config.logits_scaling),
    )


FAMILY = vary(
    DECODER,
    hf_types=("granite",),
    translate=_translate,
    reads=(
        *("attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier", "residual_multiplier"),
        "logits_scaling",
    ),
)
