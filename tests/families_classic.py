"""Tiny configs of the decoders before Llama: fused projections, biases everywhere, LayerNorm, learned positions."""

from typing import Any

_FEWER: dict[str, Any] = dict(num_key_value_heads=..., head_dim=..., bos_token_id=None, eos_token_id=None)
"""These types have as many key heads as query heads, and head_dim is hidden_size / heads."""
_FALCON: dict[str, Any] = dict(model_type="falcon", hidden_size=64, intermediate_size=..., **_FEWER)
_GPT2: dict[str, Any] = dict(hidden_size=64, n_inner=48, intermediate_size=..., **_FEWER)

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": dict(model_type="gpt_neox", hidden_size=64, rotary_pct=0.5, rotary_emb_base=500, **_FEWER),
    "gpt_neox_serial": dict(
        model_type="gpt_neox", hidden_size=64, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast",
        tie_word_embeddings=True, **_FEWER,
    ),
    "falcon": dict(multi_query=True, rope_parameters={"rope_type": "default", "rope_theta": 300.0}, **_FALCON),
    "falcon_bias": dict(multi_query=False, bias=True, parallel_attn=False, tie_word_embeddings=False, **_FALCON),
    "falcon_new": dict(new_decoder_architecture=True, num_kv_heads=4, ffn_hidden_size=48, **_FALCON),
    "falcon_one_norm": dict(
        new_decoder_architecture=True, num_kv_heads=4, num_ln_in_parallel_attn=1, bias=True, activation="relu", **_FALCON
    ),
    "gpt2": dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True, **_GPT2),
    "gpt2_untied": dict(
        model_type="gpt2", tie_word_embeddings=False, activation_function="relu", scale_attn_weights=False, **_GPT2
    ),
    "gpt_bigcode": dict(model_type="gpt_bigcode", multi_query=True, **_GPT2),
    "gpt_bigcode_heads": dict(model_type="gpt_bigcode", multi_query=False, tie_word_embeddings=False, **_GPT2),
    "bloom": dict(model_type="bloom", hidden_size=64, intermediate_size=..., max_position_embeddings=..., **_FEWER),
    "bloom_six_heads": dict(
        model_type="bloom", hidden_size=48, num_attention_heads=6, intermediate_size=..., max_position_embeddings=..., **_FEWER
    ),
    "mpt": dict(
        model_type="mpt", hidden_size=64, max_seq_len=64, attn_config={"clip_qkv": 0.7, "softmax_scale": 0.5},
        intermediate_size=..., max_position_embeddings=..., **_FEWER,
    ),
}  # fmt: skip
