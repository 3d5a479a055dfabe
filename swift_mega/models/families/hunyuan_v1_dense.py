"""Hunyuan dense: norms on queries and keys after RoPE, whose base `alpha` multiplies by a constant factor."""

from typing import Any

import torch

from swift_mega.errors import UserError
from swift_mega.models import decoder
from swift_mega.models.decoder import DECODER, translate, vary
from swift_mega.models.family import Rule
from swift_mega.models.modules.core_edits import LateQKNorm
from swift_mega.models.packs import REPLICATED
from swift_mega.models.rules import HF_LAYER, LAYER
from swift_mega.models.settings import Biases, Rope, Settings

CORE = LAYER + "self_attention.core_attention."


def rope(config: Any, head_dim: int) -> Rope:
    """The rotation. With `alpha`, `dynamic` frequencies do not depend on any length (HunYuanDenseV1RotaryEmbedding)."""
    given = config.rope_parameters
    if given.get("rope_type") != "dynamic" or not given.get("alpha"):
        return decoder.rope(config, head_dim)
    base = given["rope_theta"] * given["alpha"] ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return Rope(tuple((1.0 / base**exponents).tolist()))


def _translate(config: Any) -> Settings:
    bias = bool(config.attention_bias)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    if getattr(config, "attention_head_dim", head_dim) != head_dim:
        raise UserError(
            f"config.json: attention_head_dim={config.attention_head_dim} is not head_dim={head_dim}; correct one"
        )
    return translate(
        config,
        megatron={"add_qkv_bias": bias, "qk_layernorm": True},
        biases=Biases(attention_output=bias),
        edits=(LateQKNorm(),),
        ropes=(rope(config, head_dim),) * config.num_hidden_layers,
    )


FAMILY = vary(
    DECODER,
    hf_types=("hunyuan_v1_dense",),
    translate=_translate,
    rules=(
        Rule(CORE + "q_layernorm.weight", (HF_LAYER + "self_attn.query_layernorm.weight",), REPLICATED),
        Rule(CORE + "k_layernorm.weight", (HF_LAYER + "self_attn.key_layernorm.weight",), REPLICATED),
    ),
    reads=(
        # From org_vocab_size to text_end_id they are of the tokenizer and of pretraining: tokens, and the vocabulary before padding.
        *(
            "attention_bias",
            "attention_head_dim",
            "org_vocab_size",
            "eod_token_id",
            "pad_id",
            "sep_token_id",
            "im_start_id",
        ),
        *("im_end_id", "im_newline_id", "mask_init_id", "text_start_id", "text_end_id"),
        # They have no effect with the values below.
        *("dense_list", "pool_type", "class_num", "cla_share_factor"),
    ),
    # Fields of the architecture in published configs. transformers does not read them, because it has no other architecture.
    fixed={
        "mlp_bias": (False,),
        "norm_type": ("rms",),
        "add_classification_head": (False,),
        "use_cla": (False,),
        "use_qk_norm": (True,),
        "use_rotary_pos_emb": (True,),
    },
)
