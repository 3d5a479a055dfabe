"""Tiny configs of families whose MLPs are two linears with an activation between, and of related families."""

from typing import Any

TOKENS = dict(bos_token_id=None, eos_token_id=None)
WIDE: dict[str, Any] = dict(hidden_size=64, **TOKENS)
"""Heads of 8 features for families without head_dim: hidden_size / heads."""

FAMILIES: dict[str, dict[str, Any]] = {
    "starcoder2": dict(model_type="starcoder2", sliding_window=6, **TOKENS),
    "starcoder2_plain": dict(model_type="starcoder2", use_bias=False, tie_word_embeddings=False, **TOKENS),
    "stablelm": dict(model_type="stablelm", partial_rotary_factor=0.5, **WIDE),
    "stablelm_qk_norm": dict(
        model_type="stablelm", use_parallel_residual=True, qk_layernorm=True, partial_rotary_factor=0.5, **WIDE
    ),
    "stablelm_parallel": dict(
        model_type="stablelm", use_qkv_bias=True, use_parallel_residual=True, tie_word_embeddings=True, **WIDE
    ),
    "nemotron": dict(model_type="nemotron", **TOKENS),
    "nemotron_bias": dict(
        model_type="nemotron", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **TOKENS
    ),
}
