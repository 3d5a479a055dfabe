"""Tiny configs of dense families: parallel branches, norms of other kinds and at other places, layers without rotary embedding."""

from typing import Any

TOKENS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None)
WIDE: dict[str, Any] = dict(hidden_size=64, **TOKENS)
"""Heads of 8 features for families without head_dim: hidden_size / heads."""

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": dict(model_type="cohere", logit_scale=0.25, **TOKENS),
    "cohere_qk_norm": dict(
        model_type="cohere", use_qk_norm=True, attention_bias=True, tie_word_embeddings=False, **TOKENS
    ),
    "cohere2": dict(model_type="cohere2", sliding_window=5, sliding_window_pattern=3, **WIDE),
    # Every layer rotates. In a layer without rotary embedding the gradient of the keys' bias is zero but for rounding, because it adds the
    # same to all scores.
    "cohere2_bias": dict(
        model_type="cohere2", sliding_window=6, layer_types=["sliding_attention"] * 4, attention_bias=True, logit_scale=2.0,
        tie_word_embeddings=False, **WIDE,
    ),
    "olmo": dict(model_type="olmo", **WIDE),
    "olmo_clip": dict(model_type="olmo", clip_qkv=0.7, attention_bias=True, tie_word_embeddings=True, **WIDE),
    "exaone4": dict(model_type="exaone4", sliding_window=5, sliding_window_pattern=3, **TOKENS),
    "exaone4_full": dict(
        model_type="exaone4", sliding_window=None, layer_types=["full_attention"] * 4, tie_word_embeddings=True, **TOKENS
    ),
    "hunyuan": dict(
        model_type="hunyuan_v1_dense", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}, **TOKENS
    ),
    "hunyuan_bias": dict(model_type="hunyuan_v1_dense", attention_bias=True, tie_word_embeddings=True, **TOKENS),
    "ministral": dict(
        model_type="ministral", sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"], **TOKENS,
    ),
    "ministral_window": dict(model_type="ministral", sliding_window=6, tie_word_embeddings=True, **TOKENS),
    "internlm3": dict(model_type="internlm3", **TOKENS),
    "internlm3_bias": dict(
        model_type="internlm3", qkv_bias=True, bias=True, tie_word_embeddings=True, hidden_size=64, **TOKENS,
    ),
    "ernie4_5": dict(model_type="ernie4_5", **TOKENS),
    "ernie4_5_bias": dict(model_type="ernie4_5", use_bias=True, tie_word_embeddings=False, **TOKENS),
    "helium": dict(model_type="helium", **WIDE),
    "helium_bias": dict(model_type="helium", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **WIDE),
    "arcee": dict(model_type="arcee", **TOKENS),
    "arcee_bias": dict(
        model_type="arcee", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **TOKENS,
    ),
    "apertus": dict(model_type="apertus", **TOKENS),
    "apertus_bias": dict(model_type="apertus", attention_bias=True, tie_word_embeddings=True, **TOKENS),
    "phi": dict(model_type="phi", partial_rotary_factor=0.5, **WIDE),
    "phi_tied": dict(model_type="phi", qk_layernorm=True, tie_word_embeddings=True, **WIDE),
    "phi3_longrope": dict(  # some of the rows in tests are longer than 12 tokens and some are not
        model_type="phi3", resid_pdrop=0.0, rope_parameters=LONGROPE, original_max_position_embeddings=12,
        partial_rotary_factor=0.5, **WIDE,
    ),
    "ministral3": dict(model_type="ministral3", rope_parameters=YARN, sliding_window=9, **TOKENS),
    "ministral3_full": dict(model_type="ministral3", rope_parameters=YARN, tie_word_embeddings=True, **TOKENS),
}  # fmt: skip
