"""StableLM 2 and 3B: LayerNorm with bias, RoPE on some features of each head; a gated MLP after attention or in parallel to it.

StableLM 2 12B normalises each head of queries and keys by its own LayerNorm, with one weight tensor per head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swift_mega.models.decoder import DECODER, READS, translate, whole_heads
from swift_mega.models.family import Family, Rule
from swift_mega.models.modules.norm import HeadQKNorm
from swift_mega.models.packs import PER_KEY_HEAD, PER_QUERY_HEAD, Pack
from swift_mega.models.rules import HF_LAYER, LAYER
from swift_mega.models.settings import LAYER_NORM, Block, Settings


def _translate(config: Any) -> Settings:
    whole_heads(config)
    return translate(
        config,
        epsilon="layer_norm_eps",
        megatron={"add_qkv_bias": bool(config.use_qkv_bias)},
        norm=LAYER_NORM,
        edits=(HeadQKNorm(),) if config.qk_layernorm else (),
        block=Block(parallel=bool(config.use_parallel_residual)),
    )


def _norms_of_heads(letter: str, heads: int, pack: Pack) -> Rule:
    source = f"{HF_LAYER}self_attn.{letter}_layernorm.norms."
    parts = tuple(f"{source}{head}.weight" for head in range(heads))
    return Rule(f"{LAYER}self_attention.{letter}_layernorm.weight", parts, pack)


def _variant(raw: Mapping[str, Any]) -> Family:
    # 32 is transformers' default of both.
    queries, keys = (raw.get(key, 32) for key in ("num_attention_heads", "num_key_value_heads"))
    if not raw.get("qk_layernorm") or type(queries) is not int or type(keys) is not int:
        return FAMILY
    norms = (_norms_of_heads("q", queries, PER_QUERY_HEAD), _norms_of_heads("k", keys, PER_KEY_HEAD))
    return dataclasses.replace(FAMILY, rules=(*FAMILY.rules, *norms))


FAMILY = Family(
    hf_types=("stablelm",),
    translate=_translate,
    rules=DECODER.rules,
    reads=(READS - {"rms_norm_eps", "sliding_window", "layer_types"})
    | {"layer_norm_eps", "partial_rotary_factor", "use_qkv_bias", "use_parallel_residual", "qk_layernorm"},
    absent=DECODER.absent,
    variant=_variant,
)
