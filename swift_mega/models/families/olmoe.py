"""OLMoE: experts in every layer, RMSNorm over all heads of queries and keys; queries, keys and values clamped or not."""

from typing import Any

from swift_mega.models.decoder import DECODER, moe, translate, vary
from swift_mega.models.modules.norm import WholeQKNorm
from swift_mega.models.rules import HF_LAYER, WHOLE_QK_NORM_RULES, expert_rules
from swift_mega.models.settings import Scales, Settings

EXPERT = HF_LAYER + "mlp.experts.{e}."


def _translate(config: Any) -> Settings:
    return moe(
        translate(config, edits=(WholeQKNorm(),), scales=Scales(clip=config.clip_qkv)),
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        normalise=config.norm_topk_prob,
    )


FAMILY = vary(
    DECODER,
    hf_types=("olmoe",),
    translate=_translate,
    rules=(
        *WHOLE_QK_NORM_RULES,
        *expert_rules(HF_LAYER + "mlp.gate.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
    ),
    reads=("clip_qkv", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    fixed={"attention_bias": (False,), "sliding_window": (None,)},
)
