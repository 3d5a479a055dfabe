"""Families that differ in their norms, windows and caps."""

from typing import Any

_NO_TOKENS = dict(bos_token_id=None, eos_token_id=None)

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": dict(
        model_type="gemma3_text", sliding_window=5, query_pre_attn_scalar=12, rope_theta=5e4, rope_local_base_freq=500.0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"], **_NO_TOKENS,
    ),
    "gemma3_text_capped": dict(
        model_type="gemma3_text", sliding_window=5, sliding_window_pattern=2, final_logit_softcapping=2.0,
        tie_word_embeddings=False, rope_scaling={"rope_type": "linear", "factor": 4.0}, **_NO_TOKENS,
    ),
    "gemma2": dict(
        model_type="gemma2", sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0, attn_implementation="eager", **_NO_TOKENS,
    ),
    "gemma2_uncapped": dict(
        model_type="gemma2", sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=None, **_NO_TOKENS,
    ),
}  # fmt: skip
