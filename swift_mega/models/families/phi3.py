"""Phi-3 and Phi-4: the common decoder with query, key and value in one tensor of the checkpoint, gate and up in another."""

from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family, Rule
from swift_mega.models.packs import FUSED_QKV, ROW
from swift_mega.models.rules import EMBEDDING_RULES, FUSED_DENSE_RULES, HF_LAYER, LAYER, NORM_RULES
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    window = (config.sliding_window,) * config.num_hidden_layers
    return translate(config, windows=window)


FAMILY = Family(
    hf_types=("phi3",),
    translate=_translate,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        Rule(LAYER + "self_attention.linear_qkv.weight", (HF_LAYER + "self_attn.qkv_proj.weight",), FUSED_QKV),
        Rule(LAYER + "self_attention.linear_proj.weight", (HF_LAYER + "self_attn.o_proj.weight",), ROW),
        *FUSED_DENSE_RULES,
    ),
    reads=READS | {"original_max_position_embeddings", "partial_rotary_factor"},
    fixed={"attention_bias": (False,)},
    absent=DECODER.absent,
)
