"""DeepSeek-V2 and V2-Lite: latent attention (MLA); some dense layers, then experts chosen by softmax, from all or from the best groups."""

from typing import Any

from swift_mega.errors import UserError
from swift_mega.models.decoder import DECODER, vary
from swift_mega.models.families import deepseek_v3
from swift_mega.models.modules.router import Routing
from swift_mega.models.settings import Settings


def _translate(config: Any) -> Settings:
    limited = config.topk_method == "group_limited_greedy"
    if limited and not (config.n_group and config.topk_group):
        raise UserError(
            f"config.json: topk_method 'group_limited_greedy' with n_group={config.n_group}, topk_group={config.topk_group}; "
            "set both, or topk_method to 'greedy'"
        )
    routing = Routing(
        score="softmax",
        bias=False,
        normalise=False,
        scale=config.routed_scaling_factor,
        groups=config.n_group if limited else 1,
        chosen_groups=config.topk_group if limited else 1,
        group_best=1,
    )
    return deepseek_v3.translate_latent(config, interleaved=True, routing=routing)


FAMILY = vary(
    DECODER,
    hf_types=("deepseek_v2",),
    translate=_translate,
    rules=(*deepseek_v3.LATENT_RULES, *deepseek_v3.EXPERT_RULES),
    reads=(*deepseek_v3.READS, "topk_method"),
    fixed={
        **deepseek_v3.FIXED,
        "mlp_bias": (False, None),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False, None),  # transformers' router does not read it; DeepSeek's own code would normalise
    },
)
