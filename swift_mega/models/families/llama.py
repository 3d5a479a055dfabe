"""Llama 1 to 3.3 and models of its shape (SmolLM2, …): the common decoder, with biases in attention, MLP, both or none."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    attention, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    return translate(config, megatron={"add_qkv_bias": attention}, biases=Biases(attention_output=attention, mlp=mlp))


FAMILY = vary(DECODER, hf_types=("llama",), translate=_translate, reads=("attention_bias", "mlp_bias"))
