"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts, and a shared expert with a gate."""

from typing import Any

from swift_mega.models.decoder import moe, translate, vary, windows
from swift_mega.models.families import qwen2
from swift_mega.models.family import Rule
from swift_mega.models.packs import REPLICATED
from swift_mega.models.rules import HF_LAYER, LAYER, expert_rules, shared_expert_rules
from swift_mega.models.settings import Settings

EXPERT = HF_LAYER + "mlp.experts.{e}."
SHARED = HF_LAYER + "mlp.shared_expert."
EXPERT_RULES = (
    *expert_rules(HF_LAYER + "mlp.gate.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
    *shared_expert_rules(SHARED + "gate_proj", SHARED + "up_proj", SHARED + "down_proj"),
    Rule(LAYER + "mlp.shared_experts.gate_weight", (HF_LAYER + "mlp.shared_expert_gate.weight",), REPLICATED),
)


def _translate(config: Any) -> Settings:
    layers = tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
    return moe(
        translate(config, megatron={"add_qkv_bias": bool(config.qkv_bias)}, windows=windows(config)),
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        layers=layers,
        normalise=config.norm_topk_prob,
        shared=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


FAMILY = vary(
    qwen2.FAMILY,
    hf_types=("qwen2_moe",),
    translate=_translate,
    rules=EXPERT_RULES,
    reads=(
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"),
        *("decoder_sparse_step", "shared_expert_intermediate_size", "qkv_bias"),
    ),
)
