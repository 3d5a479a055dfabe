"""Mixtral: the common decoder with a mixture of experts in every layer."""

from typing import Any

from swift_mega.models.decoder import DECODER, moe, translate, vary, windows
from swift_mega.models.rules import HF_LAYER, expert_rules
from swift_mega.models.settings import Settings

MOE = HF_LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{e}."


def _translate(config: Any) -> Settings:
    return moe(
        translate(config, windows=windows(config)),
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        normalise=True,
    )


FAMILY = vary(
    DECODER,
    hf_types=("mixtral",),
    translate=_translate,
    rules=expert_rules(MOE + "gate.weight", EXPERT + "w1", EXPERT + "w3", EXPERT + "w2"),
    reads=("num_local_experts", "num_experts_per_tok"),
    fixed={"router_jitter_noise": (0.0,)},
)
