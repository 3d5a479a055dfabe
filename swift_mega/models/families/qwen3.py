"""Qwen3 dense: the common decoder with per-head RMSNorm on queries and keys."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary, windows
from swift_mega.models.rules import QK_NORM_RULES
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return translate(config, megatron={"qk_layernorm": True}, windows=windows(config))


FAMILY = vary(
    DECODER,
    hf_types=("qwen3",),
    translate=_translate,
    rules=QK_NORM_RULES,
    reads=("use_sliding_window", "max_window_layers"),
    fixed={"attention_bias": (False,)},
)
