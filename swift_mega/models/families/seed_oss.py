"""Seed-OSS: the common decoder with optional biases: on query, key and value, on attention's output, in the MLP."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    biases = Biases(attention_output=bool(config.attention_out_bias), mlp=bool(config.mlp_bias))
    return translate(config, megatron={"add_qkv_bias": bool(config.attention_bias)}, biases=biases)


FAMILY = vary(
    DECODER,
    hf_types=("seed_oss",),
    translate=_translate,
    reads=("attention_bias", "attention_out_bias", "mlp_bias"),
)
