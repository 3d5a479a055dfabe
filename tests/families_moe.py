"""Tiny configs of families with mixtures of experts, for tests/tiny.py."""

from typing import Any

NO_TOKENS: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None)

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(
        model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "qwen2_moe_mixed": dict(
        model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
        shared_expert_intermediate_size=40, mlp_only_layers=[1], qkv_bias=False, use_sliding_window=True,
        sliding_window=5, max_window_layers=3,
    ),
    "hunyuan_moe": dict(
        model_type="hunyuan_v1_moe", num_experts=4, moe_topk=2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}, **NO_TOKENS,
    ),
    "hunyuan_moe_bias": dict(
        model_type="hunyuan_v1_moe", num_experts=4, moe_topk=3, attention_bias=True, tie_word_embeddings=True, **NO_TOKENS
    ),
    "olmoe": dict(model_type="olmoe", hidden_size=64, num_experts=4, num_experts_per_tok=2, **NO_TOKENS),
    "olmoe_clip": dict(
        model_type="olmoe", hidden_size=64, num_experts=4, num_experts_per_tok=2, clip_qkv=0.7, norm_topk_prob=True, **NO_TOKENS
    ),
}  # fmt: skip
