"""Tiny configs of families whose layers are gated delta nets and gated attention.

The epsilon is large. What the first tokens read from a state is often near zero; its norm would magnify it, with its rounding, to one.
transformers' own gradients in float32 and float64 differ by 5e-5 at the usual epsilon, and by 4e-6 at this one.
"""

from typing import Any

NO_TOKENS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None)
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40
)
DELTA: dict[str, Any] = dict(
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=16, linear_value_head_dim=10,
    linear_conv_kernel_dim=4, rms_norm_eps=1e-2,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": dict(
        model_type="qwen3_next", layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, **DELTA, **EXPERTS, **NO_TOKENS,
    ),
    "qwen3_next_mixed": dict(
        model_type="qwen3_next", layer_types=["linear_attention", "full_attention"] * 2, norm_topk_prob=False, mlp_only_layers=[1],
        tie_word_embeddings=True, attention_bias=True, head_dim=16,
        **{**DELTA, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3}, **EXPERTS, **NO_TOKENS,
    ),
    "qwen3_next_dense": dict(
        model_type="qwen3_next", layer_types=["full_attention", "linear_attention"] * 2, mlp_only_layers=[0, 1, 2, 3],
        **{**DELTA, "linear_num_value_heads": 4}, **NO_TOKENS,
    ),
    "qwen3_next_wide": dict(
        model_type="qwen3_next", layer_types=["full_attention", "linear_attention"] * 2, num_key_value_heads=2,
        mlp_only_layers=[0, 3], **{**DELTA, "linear_num_value_heads": 12}, **EXPERTS, **NO_TOKENS,
    ),
}  # fmt: skip
