"""Llama 1 to 3.3 and models of its shape (SmolLM2, …): the common decoder, with biases all or none."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.family import Settings


def _translate(config: Any) -> Settings:
    if bool(config.attention_bias) != bool(config.mlp_bias):
        raise UserError(
            f"config.json: attention_bias={config.attention_bias} with mlp_bias={config.mlp_bias} is not supported: Megatron's linears "
            "of a layer have biases all or none; supported: both true or both false"
        )
    return translate(config, megatron={"add_bias_linear": bool(config.mlp_bias)})


FAMILY = vary(DECODER, hf_types=("llama",), translate=_translate, reads=("attention_bias", "mlp_bias"))
