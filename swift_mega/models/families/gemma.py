"""Gemma: norm weights stored minus one, embeddings times the square root of the hidden size, gated tanh-GELU, always tied."""

from typing import Any

from swift_mega.models.activations import TANH_GELU
from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.settings import NormKind, Scales, Settings


def _translate(config: Any) -> Settings:
    return translate(
        config,
        megatron={"activation_func": TANH_GELU},
        norm=NormKind(one_plus=True),
        scales=Scales(embedding=config.hidden_size**0.5),
    )


FAMILY = vary(
    DECODER,
    hf_types=("gemma",),
    translate=_translate,
    reads=("hidden_activation", "use_bidirectional_attention"),
    fixed={
        "hidden_act": ("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    },
)
