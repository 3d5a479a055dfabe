"""Gemma 3, text: Gemma 2 without caps on scores, with norms on queries and keys, and other RoPE frequencies in layers with a window."""

from typing import Any

from swift_mega.models.decoder import ropes_by_type, vary
from swift_mega.models.families import gemma2
from swift_mega.models.rules import QK_NORM_RULES
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    return gemma2.translate_gemma(
        config,
        megatron={"qk_layernorm": True},
        attention_softcap=None,
        ropes=ropes_by_type(config, config.head_dim),
    )


FAMILY = vary(
    gemma2.FAMILY,
    hf_types=("gemma3_text",),
    translate=_translate,
    rules=QK_NORM_RULES,
    reads=("rope_local_base_freq", "sliding_window_pattern"),
    fixed={"attn_logit_softcapping": (None,)},  # which transformers reads and does not apply
)
