"""MPT: ALiBi instead of positions, LayerNorm without bias, no biases, query, key and value in one tensor, always tied."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.activations import ERF_GELU
from swift_mega.models.decoder import translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.core_edits import Alibi
from swift_mega.models.packs import FUSED_QKV, ROW, VOCAB
from swift_mega.models.rules import LAYER, norm_rules, ungated_mlp_rules
from swift_mega.models.settings import NormKind, Scales, Settings
from swift_mega.models.translate import NEUTRAL
from swift_mega.ops.alibi import slopes

HF_LAYER = "transformer.blocks.{i}."
ATTENTION = {
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_pdrop": (0,),
    "attn_type": ("multihead_attention",),
    "attn_uses_sequence_id": (False,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
}
"""Fields of attn_config that transformers does not read, and the values that its model computes correctly."""


def _translate(config: Any) -> Settings:
    attention = config.attn_config
    _check_attention(attention)
    scale = {} if attention.softmax_scale is None else {"softmax_scale": attention.softmax_scale}
    return translate(
        config,
        epsilon="layer_norm_epsilon",
        ffn=4 * config.d_model,
        megatron={"activation_func": ERF_GELU, "gated_linear_unit": False, **scale},
        norm=NormKind(kind="layer"),
        ropes=(None,) * config.n_layers,
        edits=(Alibi(slopes=slopes(config.n_heads)),),
        scales=Scales(clip=attention.clip_qkv or None),
    )


def _check_attention(attention: Any) -> None:
    from transformers.models.mpt.configuration_mpt import MptAttentionConfig

    for key, allowed in ATTENTION.items():
        if getattr(attention, key) not in allowed:
            raise UserError(
                f"config.json: attn_config.{key}={getattr(attention, key)!r} is not supported; supported: "
                f"{', '.join(map(repr, allowed))}"
            )
    # Newer versions of MPT's own code add fields. Those that are false or 0 ask for nothing: rope=false, sliding_window_size=0.
    asked = {key for key, value in vars(attention).items() if value}
    if unknown := sorted(asked - vars(MptAttentionConfig()).keys() - NEUTRAL):
        listed = ", ".join(f"attn_config.{key}={getattr(attention, key)!r}" for key in unknown)
        raise UserError(
            f"config.json has fields that family mpt does not know: {listed}; they may change what the model computes. Remove them "
            "if they don't, or add them to the family's file"
        )


FAMILY = Family(
    hf_types=("mpt",),
    translate=_translate,
    pad_without_gradient=False,
    rules=(
        Rule("embedding.word_embeddings.weight", ("transformer.wte.weight",), VOCAB),
        *norm_rules("decoder.final_layernorm", "transformer.norm_f"),
        Rule("output_layer.weight", ("lm_head.weight",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "norm_1"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "norm_2"),
        Rule(LAYER + "self_attention.linear_qkv.weight", (HF_LAYER + "attn.Wqkv.weight",), FUSED_QKV),
        Rule(LAYER + "self_attention.linear_proj.weight", (HF_LAYER + "attn.out_proj.weight",), ROW),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "ffn.up_proj", HF_LAYER + "ffn.down_proj"),
    ),
    # learned_pos_emb is true in published configs, but ALiBi replaces it there. The last four do not belong to the model.
    reads=frozenset(
        "vocab_size d_model n_heads n_layers max_seq_len layer_norm_epsilon tie_word_embeddings attn_config "
        "learned_pos_emb init_config init_device tokenizer_name verbose".split()
    ),
    fixed={
        "expansion_ratio": (4,),
        "logit_scale": (None,),
        "no_bias": (True,),
        "embedding_fraction": (1.0,),
        "norm_type": ("low_precision_layernorm",),
    },
)
