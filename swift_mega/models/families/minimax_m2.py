"""MiniMax-M2: RMSNorm over all heads of queries and keys, RoPE on half of each head, experts chosen by sigmoid and a bias."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, moe, translate, vary
from swift_mega.models.family import Rule
from swift_mega.models.modules.norm import WholeQKNorm
from swift_mega.models.modules.router import Routing
from swift_mega.models.packs import REPLICATED
from swift_mega.models.rules import HF_LAYER, LAYER, WHOLE_QK_NORM_RULES, expert_rules
from swift_mega.models.settings import Settings

MOE = HF_LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{e}."


def _translate(config: Any) -> Settings:
    kinds = set(getattr(config, "attn_type_list", None) or [1])
    if kinds != {1}:
        raise UserError(
            f"config.json: attn_type_list has {sorted(kinds)}; supported: 1 (softmax attention) in every layer, which is "
            "all that transformers computes"
        )
    return moe(
        translate(config, edits=(WholeQKNorm(),)),
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        routing=Routing(score="sigmoid", balanced_score="softmax"),  # as in transformers' load_balancing_loss_func
    )


FAMILY = vary(
    DECODER,
    hf_types=("minimax_m2",),
    translate=_translate,
    rules=(
        *WHOLE_QK_NORM_RULES,
        *expert_rules(MOE + "gate.weight", EXPERT + "w1", EXPERT + "w3", EXPERT + "w2"),
        Rule(LAYER + "mlp.router.expert_bias", (MOE + "e_score_correction_bias",), REPLICATED),
    ),
    reads=(
        *("num_local_experts", "num_experts", "num_experts_per_tok", "rotary_dim", "partial_rotary_factor"),
        "attn_type_list",
        *("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),  # no published checkpoint has these modules
    ),
    fixed={
        "qk_norm_type": ("per_layer",),
        "use_qk_norm": (True,),
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "shared_intermediate_size": (0, None),
        "router_jitter_noise": (0.0,),
        "sliding_window": (None,),
        "layernorm_full_attention_beta": (1.0,),
        "layernorm_linear_attention_beta": (1.0,),
        "layernorm_mlp_beta": (1.0,),
    },
)
