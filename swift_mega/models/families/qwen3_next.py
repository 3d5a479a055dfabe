"""Qwen3-Next: gated delta nets in most layers, gated attention in the others; routed experts and a shared expert.

Checkpoints have a multi-token-prediction layer. It is kept, not computed.
"""

import dataclasses
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import READS, moe, rope, translate
from swift_mega.models.families import qwen2_moe
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.gated_delta import DeltaNet
from swift_mega.models.packs import COLUMN, FUSED_BY_KEY_HEAD, GATED_QKV, QKV, REPLICATED, ROW
from swift_mega.models.rules import (
    DENSE_RULES,
    EMBEDDING_RULES,
    HF_LAYER,
    LAYER,
    NORM_RULES,
    QK_NORM_RULES,
    attention_rules,
)
from swift_mega.models.settings import Biases, NormKind, Settings

ATTENTION, LINEAR = LAYER + "self_attention.", HF_LAYER + "linear_attn."
DELTA_RULES = (
    Rule(ATTENTION + "linear_delta_qkvz.weight", (LINEAR + "in_proj_qkvz.weight",), COLUMN),
    Rule(ATTENTION + "linear_delta_ba.weight", (LINEAR + "in_proj_ba.weight",), COLUMN),
    Rule(ATTENTION + "linear_delta_out.weight", (LINEAR + "out_proj.weight",), ROW),
    Rule(ATTENTION + "conv", (LINEAR + "conv1d.weight",), FUSED_BY_KEY_HEAD),
    Rule(ATTENTION + "A_log", (LINEAR + "A_log",), COLUMN),
    Rule(ATTENTION + "dt_bias", (LINEAR + "dt_bias",), COLUMN),
    Rule(ATTENTION + "gated_norm", (LINEAR + "norm.weight",), REPLICATED),
)
GATED_ATTENTION_RULES = tuple(
    dataclasses.replace(rule, pack=GATED_QKV) if rule.pack == QKV else rule for rule in attention_rules()
)


def _translate(config: Any) -> Settings:
    layers, bias = config.num_hidden_layers, bool(config.attention_bias)
    linear = _linear_layers(config)
    delta = DeltaNet(
        layers=linear,
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        taps=config.linear_conv_kernel_dim,
    )
    if delta.value_heads % delta.key_heads:
        raise UserError(
            f"config.json: linear_num_key_heads={delta.key_heads} does not divide linear_num_value_heads="
            f"{delta.value_heads}; correct it"
        )
    rotation = rope(config, config.head_dim)
    settings = translate(
        config,
        # hetereogenous_dist_checkpoint: layers have different parameters, which Megatron's checkpoints would otherwise stack.
        megatron=dict(
            attention_output_gate=True, qk_layernorm=True, add_qkv_bias=bias, hetereogenous_dist_checkpoint=True
        ),
        biases=Biases(attention_output=bias),
        norm=NormKind(one_plus=True),
        ropes=tuple(None if delta_here else rotation for delta_here in linear),
        edits=(delta,) if any(linear) else (),
        predict_prefix="mtp.",
    )
    heads = dataclasses.replace(settings.heads, channels=delta.channels)
    shape = dataclasses.replace(
        settings.shape,
        no_key_head_sharing="belongs to queries with a gate, which Megatron does not split over tensor ranks",
    )
    settings = dataclasses.replace(settings, heads=heads, shape=shape)
    moe_layers = tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0 for layer in range(layers)
    )
    if not any(moe_layers):
        return settings
    return moe(
        settings,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        layers=moe_layers,
        normalise=config.norm_topk_prob,
        shared=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


def _linear_layers(config: Any) -> tuple[bool, ...]:
    """Which layers have a gated delta net."""
    if strange := set(config.layer_types) - {"linear_attention", "full_attention"}:
        raise UserError(
            f"config.json: layer_types has {sorted(strange)}; supported: ['full_attention', 'linear_attention']"
        )
    return tuple(kind == "linear_attention" for kind in config.layer_types)


FAMILY = Family(
    hf_types=("qwen3_next",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *GATED_ATTENTION_RULES,
        *QK_NORM_RULES,
        *DELTA_RULES,
        *DENSE_RULES,
        *qwen2_moe.EXPERT_RULES,
    ),
    reads=(READS - {"sliding_window"})
    | {
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"),
        *("decoder_sparse_step", "shared_expert_intermediate_size", "attention_bias", "partial_rotary_factor"),
        *("full_attention_interval", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
    },
    fixed={"use_sliding_window": (False,)},
)
