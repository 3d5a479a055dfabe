"""GPT-2: learned positions, LayerNorm, biases on every linear, weights stored [in, out], query, key and value in one tensor.

Published checkpoints were saved from the bare model: their names have no `transformer.` prefix, and exports keep them so.
"""

from typing import Any

from swift_mega.models.activations import UNGATED
from swift_mega.models.decoder import translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import (
    COLUMN,
    FUSED_QKV,
    REPLICATED,
    TRANSPOSED_COLUMN,
    TRANSPOSED_FUSED_QKV,
    TRANSPOSED_ROW,
    VOCAB,
    Pack,
)
from swift_mega.models.rules import LAYER, norm_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Scales, Settings

PREFIX = "transformer."
HF_LAYER = PREFIX + "h.{i}."


def translate_gpt2(config: Any, *, kv_heads: int | None = None, by_layer: bool = False) -> Settings:
    """Settings of GPT-2 and models like it. by_layer: scores are divided by the layer's number."""
    scale = {} if config.scale_attn_weights else {"softmax_scale": 1.0}
    return translate(
        config,
        epsilon="layer_norm_epsilon",
        ffn=config.n_inner or 4 * config.n_embd,
        kv_heads=kv_heads,
        megatron={
            "activation_func": UNGATED[config.activation_function],
            "gated_linear_unit": False,
            "add_qkv_bias": True,
            **scale,
        },
        norm=LAYER_NORM,
        biases=Biases(attention_output=True, mlp=True),
        ropes=(None,) * config.n_layer,
        positions=config.n_positions,
        scales=Scales(attention_by_layer=by_layer),
    )


def _translate(config: Any) -> Settings:
    # reorder_and_upcast_attn is about the dtype of scores, which are always summed in float32 here.
    return translate_gpt2(config, by_layer=bool(config.scale_attn_by_inverse_layer_idx))


def gpt2_rules(*, query_key_value: Pack, bias: Pack, column: Pack, row: Pack) -> tuple[Rule, ...]:
    """Rules for the names of GPT-2 and models like it. The arguments are the packs of their linears."""
    attention, mlp = LAYER + "self_attention.", LAYER + "mlp."
    return (
        Rule("embedding.word_embeddings.weight", (PREFIX + "wte.weight",), VOCAB),
        Rule("embedding.position_embeddings.weight", (PREFIX + "wpe.weight",), REPLICATED),
        *norm_rules("decoder.final_layernorm", PREFIX + "ln_f"),
        Rule("output_layer.weight", ("lm_head.weight",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "ln_1"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "ln_2"),
        Rule(attention + "linear_qkv.weight", (HF_LAYER + "attn.c_attn.weight",), query_key_value),
        Rule(attention + "linear_qkv.bias", (HF_LAYER + "attn.c_attn.bias",), bias),
        Rule(attention + "linear_proj.weight", (HF_LAYER + "attn.c_proj.weight",), row),
        Rule(attention + "linear_proj.bias", (HF_LAYER + "attn.c_proj.bias",), REPLICATED),
        Rule(mlp + "linear_fc1.weight", (HF_LAYER + "mlp.c_fc.weight",), column),
        Rule(mlp + "linear_fc1.bias", (HF_LAYER + "mlp.c_fc.bias",), COLUMN),
        Rule(mlp + "linear_fc2.weight", (HF_LAYER + "mlp.c_proj.weight",), row),
        Rule(mlp + "linear_fc2.bias", (HF_LAYER + "mlp.c_proj.bias",), REPLICATED),
    )


FAMILY = Family(
    hf_types=("gpt2",),
    translate=_translate,
    pad_without_gradient=False,
    rules=gpt2_rules(
        query_key_value=TRANSPOSED_FUSED_QKV, bias=FUSED_QKV, column=TRANSPOSED_COLUMN, row=TRANSPOSED_ROW
    ),
    # n_ctx is an older name of n_positions; the summary_ fields are for classification.
    reads=frozenset(
        "vocab_size n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
        "tie_word_embeddings scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn summary_type "
        "summary_use_proj summary_activation summary_proj_to_labels".split()
    ),
    fixed={
        "activation_function": tuple(UNGATED),
        "add_cross_attention": (False,),
    },
    absent=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
