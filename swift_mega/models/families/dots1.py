"""dots.llm1: Qwen3's attention; some dense layers, then DeepSeek-V3's choice of experts."""

from typing import Any

from swift_mega.models.decoder import DECODER, translate, vary, windows
from swift_mega.models.families import deepseek_v3
from swift_mega.models.rules import QK_NORM_RULES
from swift_mega.models.settings import Biases, Settings


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    settings = translate(
        config,
        megatron={"qk_layernorm": True, "add_qkv_bias": bias},
        biases=Biases(attention_output=bias),
        windows=windows(config),
    )
    return deepseek_v3.translate_experts(settings, config, deepseek_v3.sigmoid_routing(config))


FAMILY = vary(
    DECODER,
    hf_types=("dots1",),
    translate=_translate,
    rules=(*QK_NORM_RULES, *deepseek_v3.BIASED_EXPERT_RULES),
    reads=(*deepseek_v3.EXPERT_READS, "attention_bias", "norm_topk_prob", "max_window_layers"),
    fixed={
        "moe_layer_freq": (1,),
        "use_sliding_window": (False, None),  # transformers does not read it: `sliding_window` alone decides
        "scoring_func": ("noaux_tc", "sigmoid"),  # two names of the only router that this type has
    },
)
