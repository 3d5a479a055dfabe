"""Tiny configs of the families with their own way to choose experts."""

from typing import Any

NO_TOKENS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None)
GROUPED: dict[str, Any] = dict(
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=4, moe_intermediate_size=24, first_k_dense_replace=1,
    n_group=4, topk_group=2, routed_scaling_factor=2.5,
)  # fmt: skip
LATENT: dict[str, Any] = dict(
    num_key_value_heads=8, head_dim=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, **GROUPED
)  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.9,
    "mscale_all_dim": 0.6, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": dict(model_type="deepseek_v2", topk_method="group_limited_greedy", rms_norm_eps=1e-5, **LATENT),
    "deepseek_v2_lite": dict(
        model_type="deepseek_v2", topk_method="greedy", rope_parameters=YARN, tie_word_embeddings=True,
        **{**LATENT, "q_lora_rank": None, "v_head_dim": 6, "routed_scaling_factor": 0.7, "n_shared_experts": 1},
    ),
    "kimi_k2": dict(
        model_type="deepseek_v3", written_as="kimi_k2", norm_topk_prob=True, rope_parameters={**YARN, "beta_fast": 1, "beta_slow": 1},
        **{**LATENT, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 2.827},
    ),
    "glm4_moe": dict(
        model_type="glm4_moe", attention_bias=True, use_qk_norm=True, tie_word_embeddings=True, norm_topk_prob=False, **GROUPED, **NO_TOKENS
    ),
    "glm4_moe_plain": dict(
        model_type="glm4_moe", **{**GROUPED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}, **NO_TOKENS
    ),
    "dots1": dict(
        model_type="dots1", attention_bias=True, sliding_window=5, max_window_layers=2, tie_word_embeddings=True,
        norm_topk_prob=False, **GROUPED, **NO_TOKENS,
    ),
    "dots1_plain": dict(
        model_type="dots1", sliding_window=None, norm_topk_prob=True,
        **{**GROUPED, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}, **NO_TOKENS,
    ),
    "minimax_m2": dict(model_type="minimax_m2", num_local_experts=4, num_experts_per_tok=2, rotary_dim=4, **NO_TOKENS),
    "minimax_m2_tied": dict(
        model_type="minimax_m2", num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True, rope_theta=1e4, **NO_TOKENS
    ),
    "ernie4_5_moe": dict(
        model_type="ernie4_5_moe", moe_num_experts=6, moe_k=3, moe_num_shared_experts=2, moe_intermediate_size=24,
        moe_layer_start_index=1, moe_layer_end_index=2, **NO_TOKENS,
    ),
    "ernie4_5_moe_interval": dict(
        model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=0, moe_intermediate_size=24,
        moe_layer_start_index=0, moe_layer_interval=2, moe_norm_min=0.9, tie_word_embeddings=False, **NO_TOKENS,
    ),
    "granitemoe": dict(
        model_type="granitemoe", num_local_experts=4, num_experts_per_tok=2, attention_bias=True, embedding_multiplier=3.0,
        attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=2.0, tie_word_embeddings=True, **NO_TOKENS,
    ),
    "granitemoe_plain": dict(model_type="granitemoe", num_local_experts=6, num_experts_per_tok=3, **NO_TOKENS),
    "granitemoeshared": dict(
        model_type="granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40,
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=2.0, **NO_TOKENS,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=5, swiglu_limit=0.6,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 64,
        }, **NO_TOKENS,
    ),
    "gpt_oss_tied": dict(
        model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=3, sliding_window=5, attention_bias=False,
        tie_word_embeddings=True, **NO_TOKENS,
    ),
}  # fmt: skip
