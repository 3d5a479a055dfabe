"""Gemma 2: Gemma with norms before and after attention and MLP, a sliding window in every other layer, soft caps on scores and logits."""

from typing import Any

from swift_mega.models.activations import TANH_GELU
from swift_mega.models.decoder import READS, translate, windows
from swift_mega.models.families import gemma
from swift_mega.models.family import Family
from swift_mega.models.rules import DENSE_RULES, EMBEDDING_RULES, HF_LAYER, LAYER, attention_rules, norm_rules
from swift_mega.models.settings import Block, NormKind, Scales, Settings

FOUR_NORM_RULES = (
    *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
    *norm_rules(LAYER + "post_self_attn_layernorm", HF_LAYER + "post_attention_layernorm"),
    *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "pre_feedforward_layernorm"),
    *norm_rules(LAYER + "post_mlp_layernorm", HF_LAYER + "post_feedforward_layernorm"),
)


def translate_gemma(
    config: Any, *, megatron: dict[str, Any], attention_softcap: float | None, **changes: Any
) -> Settings:
    """Settings that Gemma 2 and 3 share."""
    return translate(
        config,
        megatron={
            "activation_func": TANH_GELU,
            "softmax_scale": config.query_pre_attn_scalar**-0.5,
            **megatron,
        },
        norm=NormKind(one_plus=True),
        block=Block(post_norms=True),
        scales=Scales(
            embedding=config.hidden_size**0.5,
            attention_softcap=attention_softcap,
            logit_softcap=config.final_logit_softcapping,
        ),
        windows=windows(config),
        **changes,
    )


def _translate(config: Any) -> Settings:
    return translate_gemma(config, megatron={}, attention_softcap=config.attn_logit_softcapping)


FAMILY = Family(
    hf_types=("gemma2",),
    translate=_translate,
    rules=(*EMBEDDING_RULES, *FOUR_NORM_RULES, *attention_rules(), *DENSE_RULES),
    reads=READS
    | {
        *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        "cache_implementation",  # a setting of generation
    },
    fixed={
        **gemma.FAMILY.fixed,
        "hidden_act": ("gelu_pytorch_tanh",),
        "hidden_activation": ("gelu_pytorch_tanh",),
    },
    absent=gemma.FAMILY.absent,
)
