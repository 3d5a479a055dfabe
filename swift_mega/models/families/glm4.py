"""GLM-4 (0414): norms before and after attention and MLP, interleaved RoPE on half of each head, gate and up in one tensor."""

from typing import Any

from swift_mega.models.decoder import DECODER, READS, rope, translate
from swift_mega.models.family import Family
from swift_mega.models.rules import EMBEDDING_RULES, FUSED_DENSE_RULES, HF_LAYER, LAYER, attention_rules, norm_rules
from swift_mega.models.settings import Block, Settings


def _translate(config: Any) -> Settings:
    rotation = rope(config, config.head_dim, interleaved=True)
    return translate(
        config,
        megatron={"add_qkv_bias": bool(config.attention_bias)},
        block=Block(post_norms=True),
        ropes=(rotation,) * config.num_hidden_layers,
    )


FAMILY = Family(
    hf_types=("glm4",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
        *norm_rules(LAYER + "post_self_attn_layernorm", HF_LAYER + "post_self_attn_layernorm"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "post_attention_layernorm"),
        *norm_rules(LAYER + "post_mlp_layernorm", HF_LAYER + "post_mlp_layernorm"),
        *attention_rules(),
        *FUSED_DENSE_RULES,
    ),
    reads=READS | {"attention_bias", "partial_rotary_factor"},
    absent=DECODER.absent,
)
