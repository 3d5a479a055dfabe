"""Qwen2 and Qwen2.5: the common decoder with biases on query, key and value."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary, windows
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return translate(config, megatron={"add_qkv_bias": True}, windows=windows(config))


FAMILY = vary(DECODER, hf_types=("qwen2",), translate=_translate, reads=("use_sliding_window", "max_window_layers"))
