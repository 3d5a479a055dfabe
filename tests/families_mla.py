"""Families with latent attention (MLA)."""

LATENT = dict(
    num_key_value_heads=8, head_dim=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=4, moe_intermediate_size=24, first_k_dense_replace=1,
    n_group=4, topk_group=2,
    routed_scaling_factor=2.5,
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
        "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}  # fmt: skip

FAMILIES = {
    "deepseek_v3_dense": dict(model_type="deepseek_v3", norm_topk_prob=True, **{**LATENT, "first_k_dense_replace": 4}),
    "deepseek_v3_moe": dict(model_type="deepseek_v3", norm_topk_prob=True, **LATENT),
    "deepseek_v3_moe_yarn": dict(
        model_type="deepseek_v3", norm_topk_prob=True, **{**LATENT, "n_group": 1, "topk_group": 1}, rope_parameters=YARN
    ),
    "deepseek_v3_moe_plain": dict(
        model_type="deepseek_v3", norm_topk_prob=False, rope_interleave=False, rms_norm_eps=1e-5,
        **{**LATENT, "q_lora_rank": None, "v_head_dim": 10, "n_shared_experts": 1},
    ),
}  # fmt: skip
