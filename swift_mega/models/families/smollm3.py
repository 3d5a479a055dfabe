"""SmolLM3: the common decoder without RoPE in every fourth layer (NoPE)."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary, windows
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    attention, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    settings = translate(
        config,
        megatron={"add_qkv_bias": attention},
        biases=Biases(attention_output=attention, mlp=mlp),
        windows=windows(config),
    )
    ropes = tuple(rope if on else None for rope, on in zip(settings.ropes, config.no_rope_layers, strict=True))
    return dataclasses.replace(settings, ropes=ropes)


FAMILY = vary(
    DECODER,
    hf_types=("smollm3",),
    translate=_translate,
    reads=(
        "attention_bias",
        "mlp_bias",
        "no_rope_layers",
        "no_rope_layer_interval",
        "use_sliding_window",
        "max_window_layers",
    ),
)
