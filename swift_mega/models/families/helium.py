"""Helium: the common decoder with interleaved RoPE."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, rope, translate, vary
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    heads, head_dim = config.num_attention_heads, config.head_dim
    if heads * head_dim != config.hidden_size:  # transformers' output projection supports no other shape
        raise UserError(
            f"config.json: num_attention_heads={heads} times head_dim={head_dim} is not hidden_size={config.hidden_size}; "
            "correct one"
        )
    return translate(
        config,
        megatron={"add_qkv_bias": bool(config.attention_bias)},
        biases=Biases(mlp=bool(config.mlp_bias)),
        ropes=(rope(config, head_dim, interleaved=True),) * config.num_hidden_layers,
    )


FAMILY = vary(DECODER, hf_types=("helium",), translate=_translate, reads=("attention_bias", "mlp_bias"))
