"""GLM-4.5 to 4.7: RoPE on half of each head, norms on queries and keys or not; some dense layers, then DeepSeek-V3's choice of experts.

Checkpoints have a multi-token-prediction layer after the last layer. It is kept, not computed.
"""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.families import deepseek_v3
from swift_mega.models.rules import QK_NORM_RULES
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    megatron = {"add_qkv_bias": bool(config.attention_bias), "qk_layernorm": bool(config.use_qk_norm)}
    return deepseek_v3.translate_experts(
        translate(config, megatron=megatron), config, deepseek_v3.sigmoid_routing(config)
    )


FAMILY = vary(
    DECODER,
    hf_types=("glm4_moe",),
    translate=_translate,
    rules=(*QK_NORM_RULES, *deepseek_v3.BIASED_EXPERT_RULES),
    reads=(
        *deepseek_v3.EXPERT_READS,
        *deepseek_v3.MTP_READS,
        "attention_bias",
        "norm_topk_prob",
        "partial_rotary_factor",
        "use_qk_norm",
    ),
    fixed={"moe_layer_freq": (1,), "sliding_window": (None,), "scoring_func": ("sigmoid",)},
)
