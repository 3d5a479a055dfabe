"""BLOOM: ALiBi instead of positions, a norm after the embedding, LayerNorm, biases on every linear, always tied.

Published checkpoints were saved from the bare model, as GPT-2's were.
"""

from typing import Any

from swift_mega.models.activations import TANH_GELU
from swift_mega.models.decoder import translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.core_edits import Alibi
from swift_mega.models.modules.norm import EmbeddingNorm
from swift_mega.models.packs import VOCAB
from swift_mega.models.rules import LAYER, fused_attention_rules, norm_rules, ungated_mlp_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Settings
from swift_mega.ops.alibi import slopes

PREFIX = "transformer."
HF_LAYER = PREFIX + "h.{i}."


def _translate(config: Any) -> Settings:
    return translate(
        config,
        epsilon="layer_norm_epsilon",
        ffn=4 * config.hidden_size,
        megatron={"activation_func": TANH_GELU, "gated_linear_unit": False, "add_qkv_bias": True},
        norm=LAYER_NORM,
        biases=Biases(attention_output=True, mlp=True),
        ropes=(None,) * config.n_layer,
        edits=(Alibi(slopes=slopes(config.n_head)), EmbeddingNorm()),
    )


FAMILY = Family(
    hf_types=("bloom",),
    translate=_translate,
    pad_without_gradient=False,
    rules=(
        Rule("embedding.word_embeddings.weight", (PREFIX + "word_embeddings.weight",), VOCAB),
        *norm_rules("embedding.norm", PREFIX + "word_embeddings_layernorm"),
        *norm_rules("decoder.final_layernorm", PREFIX + "ln_f"),
        Rule("output_layer.weight", ("lm_head.weight",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "post_attention_layernorm"),
        *fused_attention_rules(HF_LAYER + "self_attention.query_key_value", HF_LAYER + "self_attention.dense"),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.dense_h_to_4h", HF_LAYER + "mlp.dense_4h_to_h"),
    ),
    # From seq_length on they are settings of Megatron-DeepSpeed, which trained it: a length that nothing depends on, fused kernels,
    # and an offset of ALiBi that does not change the softmax.
    reads=frozenset(
        "vocab_size hidden_size n_embed n_layer n_head num_attention_heads layer_norm_epsilon tie_word_embeddings "
        "seq_length attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add "
        "skip_bias_add_qkv".split()
    ),
    fixed={
        "apply_residual_connection_post_layernorm": (False,),
        "slow_but_exact": (False,),
        "n_inner": (None,),
    },
)
