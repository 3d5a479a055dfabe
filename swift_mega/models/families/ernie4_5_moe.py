"""ERNIE 4.5 with experts: interleaved RoPE; experts chosen by softmax and a bias, in layers at a fixed interval.

Checkpoints have multi-token-prediction modules. They are kept, not computed.
"""

from typing import Any

from swift_mega.models.decoder import DECODER, moe, rope, translate, vary
from swift_mega.models.family import Rule
from swift_mega.models.modules.router import Routing
from swift_mega.models.packs import ONE_ROW
from swift_mega.models.rules import HF_LAYER, LAYER, expert_rules, shared_expert_rules
from swift_mega.models.settings import Settings

EXPERT, SHARED = HF_LAYER + "mlp.experts.{e}.", HF_LAYER + "mlp.shared_experts."


def _translate(config: Any) -> Settings:
    layers = range(config.num_hidden_layers)
    chosen = range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return moe(
        translate(config, ropes=(rope(config, head_dim, interleaved=True),) * len(layers), predict_prefix="model.mtp_"),
        experts=config.moe_num_experts,
        top_k=config.moe_k,
        ffn=config.moe_intermediate_size,
        layers=tuple(layer in chosen and (layer + 1) % config.moe_layer_interval == 0 for layer in layers),
        shared=config.moe_num_shared_experts * config.moe_intermediate_size,
        routing=Routing(score="softmax", smallest=config.moe_norm_min),
    )


FAMILY = vary(
    DECODER,
    hf_types=("ernie4_5_moe",),
    translate=_translate,
    rules=(
        *expert_rules(HF_LAYER + "mlp.gate.weight", EXPERT + "gate_proj", EXPERT + "up_proj", EXPERT + "down_proj"),
        *shared_expert_rules(SHARED + "gate_proj", SHARED + "up_proj", SHARED + "down_proj"),
        Rule(LAYER + "mlp.router.expert_bias", (HF_LAYER + "mlp.moe_statics.e_score_correction_bias",), ONE_ROW),
    ),
    reads=(
        *("moe_num_experts", "moe_k", "moe_num_shared_experts", "moe_intermediate_size", "moe_norm_min"),
        *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        *("num_experts", "num_experts_per_tok"),  # transformers' other names of moe_num_experts and moe_k
        *("num_nextn_predict_layers", "moe_capacity"),  # settings of the checkpoint's training
    ),
    fixed={
        "use_bias": (False, None),
        "use_rmsnorm": (True,),
        "moe_gate": ("topk", "topk_fused"),
        "moe_use_aux_free": (True,),
        "sliding_window": (None,),
    },
)
