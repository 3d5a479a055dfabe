"""ERNIE 4.5, dense: the common decoder with interleaved RoPE, and biases on every linear or on none."""

from typing import Any

from swift_mega.models.decoder import DECODER, rope, translate, vary
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    bias = bool(config.use_bias)
    rotation = rope(config, config.head_dim, interleaved=True)
    return translate(
        config,
        megatron={"add_qkv_bias": bias},
        biases=Biases(attention_output=bias, mlp=bias),
        ropes=(rotation,) * config.num_hidden_layers,
    )


FAMILY = vary(DECODER, hf_types=("ernie4_5",), translate=_translate, reads=("use_bias",))
