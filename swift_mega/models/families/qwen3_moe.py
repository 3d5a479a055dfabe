"""Qwen3-MoE: Qwen3 with routed experts in every layer but the listed dense ones."""

from typing import Any

from swift_mega.models.decoder import moe, vary
from swift_mega.models.families import qwen3
from swift_mega.models.rules import HF_LAYER, expert_rules
from swift_mega.models.settings import Settings

EXPERT = HF_LAYER + "mlp.experts.{e}."


def _translate(config: Any) -> Settings:
    layers = tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
    settings = qwen3.FAMILY.translate(config)
    return moe(
        settings,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        layers=layers,
        normalise=config.norm_topk_prob,
    )


FAMILY = vary(
    qwen3.FAMILY,
    hf_types=("qwen3_moe",),
    translate=_translate,
    rules=expert_rules(HF_LAYER + "mlp.gate.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
    reads=(
        *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("mlp_only_layers", "decoder_sparse_step"),
    ),
    # Some training code writes these (Qwen3-Coder's), and nothing reads them.
    fixed={"qkv_bias": (False,), "shared_expert_intermediate_size": (0, None), "use_qk_norm": (True,)},
)
