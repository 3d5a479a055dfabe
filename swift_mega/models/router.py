"""Megatron's router with another choice of experts: sigmoid or softmax scores, a bias in the choice only, groups of experts.

Only `choose` is ours: one pure function from logits to weights. Logits, balancing losses and dispatch stay Megatron's. The bias
is a buffer under Megatron's own name for it, `expert_bias`; it stays as the checkpoint has it, unless model.megatron asks for
Megatron's balancing without a loss (moe_router_enable_expert_bias), which moves it after every step.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.errors import UserError
from swift_mega.models.settings import Routing


class Router(TopKRouter):
    """Chooses `moe_router_topk` experts per token as `routing` says."""

    def __init__(self, config: TransformerConfig, *args: Any, routing: Routing, **given: Any) -> None:
        super().__init__(config, *args, **given)
        self.choice = routing
        refuse_without_effect(config, routing)
        if routing.bias and self.expert_bias is None:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts, dtype=torch.float32))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [tokens / s, 1, experts] -> weights [tokens / s, experts], zero where not chosen, and the choice, bool."""
        logits = self.apply_z_loss(logits.flatten(0, 1))
        weights, chosen = choose(logits, self.topk, self.choice, self.expert_bias)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            balanced, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
            weights = self._apply_aux_loss(weights, scores, balanced)
        self._apply_expert_bias(chosen)
        return weights, chosen


def refuse_without_effect(config: TransformerConfig, routing: Routing) -> None:
    """UserError for settings of model.megatron that only Megatron's own choice of experts reads."""
    supported: dict[str, tuple[Any, ...]] = {
        "moe_router_load_balancing_type": ("none", "aux_loss"),
        "moe_expert_capacity_factor": (None,),
        "moe_router_num_groups": (None,),
        "moe_router_group_topk": (None,),
        "moe_router_topk_scaling_factor": (None,),
        "moe_router_fusion": (False,),
        "moe_router_pre_softmax": (True,),
        "moe_router_score_function": (routing.score,),
    }
    for name, values in supported.items():
        if (value := getattr(config, name)) not in values:
            raise UserError(
                f"model.megatron.{name}={value!r}: this model's own choice of experts knows only "
                f"{' and '.join(map(repr, values))}; remove the setting"
            )


def choose(logits: Tensor, top_k: int, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [tokens, experts], bias [experts] -> weights [tokens, experts], zero where not chosen, and the choice, bool.

    Source: DeepseekV2TopkRouter, DeepseekV3TopkRouter and Ernie4_5_MoeTopKRouter of transformers; the choice passes no gradient.
    """
    wide = logits.float()
    scores = wide.sigmoid() if routing.score == "sigmoid" else wide.softmax(-1)
    with torch.no_grad():
        rank_by = scores if bias is None else scores + bias
        if routing.groups > 1:
            rank_by = _within_groups(rank_by, routing)
        experts = rank_by.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + routing.added).clamp(min=routing.smallest)
    weights = (weights * routing.scale).type_as(logits)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return torch.zeros_like(logits).scatter(1, experts, weights), chosen


def _within_groups(scores: Tensor, routing: Routing) -> Tensor:
    """scores [tokens, experts], minus infinity outside of each token's best groups."""
    grouped = scores.view(len(scores), routing.groups, -1)
    best = grouped.topk(routing.group_best, dim=-1).values.sum(-1).topk(routing.chosen_groups, dim=-1).indices
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
