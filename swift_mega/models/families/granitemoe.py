"""Granite with experts, which are stacked in one tensor per layer."""

import dataclasses
from typing import Any

from swift_mega.models.decoder import moe
from swift_mega.models.families import granite
from swift_mega.models.family import Rule
from swift_mega.models.packs import FUSED_GATE_UP, REPLICATED, ROW
from swift_mega.models.rules import EMBEDDING_RULES, HF_LAYER, LAYER, NORM_RULES, attention_rules
from swift_mega.models.settings import Settings

MOE, EXPERT = HF_LAYER + "block_sparse_moe.", LAYER + "mlp.experts.local_experts.{e}."


def translate_granite(config: Any, shared: int = 0) -> Settings:
    """Settings. shared: width of the shared expert, which every token passes; 0: there is none."""
    return moe(
        granite.FAMILY.translate(config),
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        shared=shared,
    )


FAMILY = dataclasses.replace(
    granite.FAMILY,
    hf_types=("granitemoe",),
    translate=translate_granite,
    rules=(
        *EMBEDDING_RULES,
        *NORM_RULES,
        *attention_rules(),
        Rule(LAYER + "mlp.router.weight", (MOE + "router.layer.weight",), REPLICATED),
        Rule(EXPERT + "linear_fc1.weight", (MOE + "input_linear.weight[{e}]",), FUSED_GATE_UP),
        Rule(EXPERT + "linear_fc2.weight", (MOE + "output_linear.weight[{e}]",), ROW),
    ),
    reads=granite.FAMILY.reads | {"num_local_experts", "num_experts_per_tok"},
    fixed={**granite.FAMILY.fixed, "mlp_bias": (False,), "sliding_window": (None,)},
)
