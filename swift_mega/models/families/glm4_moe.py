"""GLM-4.5 to 4.7: half the features rotated, heads normalised or not, and DeepSeek-V3's choice of experts after the first layers.

The multi-token-prediction layer that checkpoints hold after the last layer is not part of what this computes, but kept.
"""

from typing import Any

from swift_mega.models.decoder import DECODER, QK_NORM_RULES, translate, vary
from swift_mega.models.families.deepseek_v3 import (
    BIASED_EXPERT_RULES,
    EXPERT_READS,
    MTP_READS,
    sigmoid_routing,
    translate_experts,
)
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    megatron = {"add_qkv_bias": bool(config.attention_bias), "qk_layernorm": bool(config.use_qk_norm)}
    return translate_experts(translate(config, megatron=megatron), config, sigmoid_routing(config))


FAMILY = vary(
    DECODER,
    hf_types=("glm4_moe",),
    translate=_translate,
    rules=(*QK_NORM_RULES, *BIASED_EXPERT_RULES),
    reads=(*EXPERT_READS, *MTP_READS, "attention_bias", "norm_topk_prob", "partial_rotary_factor", "use_qk_norm"),
    fixed={"moe_layer_freq": (1,), "sliding_window": (None,), "scoring_func": ("sigmoid",)},
)
