"""Falcon: LayerNorm, mostly no biases, attention and MLP in parallel; one key head (7B), or groups and a norm for each branch (40B).

The fused projection holds queries, key and value of one group of heads after another. This is Megatron's own order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.activations import UNGATED
from swift_mega.models.decoder import translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import VOCAB
from swift_mega.models.rules import LAYER, fused_attention_rules, norm_rules, ungated_mlp_rules
from swift_mega.models.settings import LAYER_NORM, Biases, Block, Settings

HF_LAYER = "transformer.h.{i}."


def _translate(config: Any) -> Settings:
    grouped, bias = bool(config.new_decoder_architecture), bool(config.bias)
    heads = config.num_attention_heads
    kv_heads = config.num_kv_heads if grouped else 1 if config.multi_query else heads
    return translate(
        config,
        epsilon="layer_norm_epsilon",
        ffn=config.ffn_hidden_size,
        kv_heads=kv_heads,
        megatron={
            "activation_func": UNGATED[config.activation],
            "gated_linear_unit": False,
            "add_qkv_bias": bias,
        },
        norm=LAYER_NORM,
        biases=Biases(attention_output=bias, mlp=bias),
        block=_block(config, grouped),
    )


def _block(config: Any, grouped: bool) -> Block:
    """How the branches are connected. UserError where transformers' forward pass would use a norm that it did not build."""
    norms, beside = config.num_ln_in_parallel_attn, bool(config.parallel_attn)
    norms = norms or (2 if grouped else 1)
    if grouped and not beside:
        raise UserError(
            "config.json: parallel_attn=false with new_decoder_architecture=true is not supported by transformers; correct one"
        )
    if norms not in (1, 2) or (norms == 2 and not grouped):
        raise UserError(
            f"config.json: num_ln_in_parallel_attn={norms} with new_decoder_architecture={str(grouped).lower()} is not supported by "
            "transformers; supported: 1, or 2 with new_decoder_architecture=true"
        )
    return Block(parallel=beside, shared_norm=norms == 1)


def _rules(*norms: str) -> tuple[Rule, ...]:
    """norms: Hugging Face names of the norm before attention and of the norm before the MLP."""
    before_attention, before_mlp = norms
    return (
        Rule("embedding.word_embeddings.weight", ("transformer.word_embeddings.weight",), VOCAB),
        *norm_rules("decoder.final_layernorm", "transformer.ln_f"),
        Rule("output_layer.weight", ("lm_head.weight",), VOCAB),
        *norm_rules(LAYER + "input_layernorm", HF_LAYER + before_attention),
        *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + before_mlp),
        *fused_attention_rules(HF_LAYER + "self_attention.query_key_value", HF_LAYER + "self_attention.dense"),
        *ungated_mlp_rules(LAYER + "mlp.", HF_LAYER + "mlp.dense_h_to_4h", HF_LAYER + "mlp.dense_4h_to_h"),
    )


def _variant(raw: Mapping[str, Any]) -> Family:
    two = bool(raw.get("new_decoder_architecture")) and raw.get("num_ln_in_parallel_attn") in (None, 2)
    return dataclasses.replace(FAMILY, rules=_rules("ln_attn", "ln_mlp")) if two else FAMILY


FAMILY = Family(
    hf_types=("falcon",),
    translate=_translate,
    pad_without_gradient=False,
    rules=_rules("input_layernorm", "post_attention_layernorm"),
    reads=frozenset(
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_kv_heads ffn_hidden_size activation bias multi_query "
        "parallel_attn new_decoder_architecture num_ln_in_parallel_attn layer_norm_epsilon max_position_embeddings "
        "tie_word_embeddings rope_theta rope_scaling rope_parameters".split()
    ),
    fixed={
        "activation": tuple(UNGATED),
        "alibi": (False, None),
        "apply_residual_connection_post_layernorm": (False,),
    },
    absent=(r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
    variant=_variant,
)
