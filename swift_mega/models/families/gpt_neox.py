"""GPT-NeoX and Pythia: LayerNorm, biases, RoPE on a quarter of each head, attention and MLP in parallel with a norm each.

The fused projection holds query, key and value of one head after another. With a key head per query head this is Megatron's own order,
so the tensor is sharded as it is.
"""

from typing import Any

from swift_mega.models.activations import UNGATED
from swift_mega.models.decoder import translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import VOCAB
from swift_mega.models.rules import LAYER, fused_attention_rules, norm_rules, ungated_mlp_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Block, Settings

HF_LAYER = "gpt_neox.layers.{i}."


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    return translate(
        config,
        epsilon="layer_norm_eps",
        megatron={
            "activation_func": UNGATED[config.hidden_act],
            "gated_linear_unit": False,
            "add_qkv_bias": bias,
        },
        norm=LAYER_NORM,
        biases=Biases(attention_output=bias, mlp=True),
        block=Block(parallel=bool(config.use_parallel_residual), shared_norm=False),
    )


FAMILY = Family(
    hf_types=("gpt_neox",),
    translate=_translate,
    pad_without_gradient=False,
    rules=(
        Rule("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), VOCAB),
        *norm_rules("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
        Rule("output_layer.weight", ("embed_out.weight",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + "input_layernorm"),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "post_attention_layernorm"),
        *fused_attention_rules(HF_LAYER + "attention.query_key_value", HF_LAYER + "attention.dense"),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.dense_h_to_4h", HF_LAYER + "mlp.dense_4h_to_h"),
    ),
    reads=frozenset(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
        "layer_norm_eps tie_word_embeddings use_parallel_residual attention_bias rotary_pct rotary_emb_base rope_theta "
        "rope_scaling rope_parameters partial_rotary_factor".split()
    ),
    fixed={
        "hidden_act": tuple(UNGATED),
    },
    absent=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
