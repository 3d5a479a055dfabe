"""StableLM 2 and 3B: LayerNorm with bias, some features of a head rotated; a gated MLP after attention or beside it."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, READS, translate
from swift_mega.models.family import Family
from swift_mega.models.settings import Block, Settings
from swift_mega.models.starcoder2 import LAYER_NORM


def whole_heads(config: Any) -> None:
    """UserError where config.json names a head_dim that a family, whose heads share out hidden_size, does not have."""
    named, real = getattr(config, "head_dim", None), config.hidden_size // config.num_attention_heads
    if named not in (None, real):
        raise UserError(
            f"config.json: head_dim={named}, but hidden_size / num_attention_heads is {real}; delete head_dim"
        )


def _translate(config: Any) -> Settings:
    whole_heads(config)
    return translate(
        config,
        epsilon="layer_norm_eps",
        megatron={"add_qkv_bias": bool(config.use_qkv_bias)},
        norm=LAYER_NORM,
        block=Block(parallel=bool(config.use_parallel_residual)),
    )


FAMILY = Family(
    hf_types=("stablelm",),
    translate=_translate,
    rules=DECODER.rules,
    reads=(READS - {"rms_norm_eps", "sliding_window", "layer_types"})
    | {"layer_norm_eps", "partial_rotary_factor", "use_qkv_bias", "use_parallel_residual"},
    fixed={"qk_layernorm": (False,)},
    absent=DECODER.absent,
)
