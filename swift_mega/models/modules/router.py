"""Megatron's router with our losses (models/modules/balancing.py) and, where a family needs it, our choice of experts.

`choose` is one pure function from logits to weights: sigmoid or softmax scores, a bias in the choice only, groups of experts. Logits and
dispatch stay Megatron's. The bias is a buffer with Megatron's own name for it, `expert_bias`. It keeps the checkpoint's values, unless
model.megatron asks for Megatron's balancing without a loss (moe_router_enable_expert_bias), which changes it after every step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.errors import UserError
from swift_mega.models.edits import Edit, Parts, bound, mlp_of
from swift_mega.models.modules.balancing import RouterLosses


@dataclass(frozen=True, kw_only=True)
class Routing(Edit):
    """How a token's experts are chosen and weighted, where that is not Megatron's softmax over the logits.

    bias: each expert has a constant in the checkpoint, without a gradient. It is added to the scores for the choice, not for the weights.
    normalise: the weights are divided by max(their sum + `added`, `smallest`). All weights are then multiplied by `scale`.
    groups: the experts form this many equal groups. They are chosen from `chosen_groups` of them only: those with the largest sum of their
    `group_best` best scores.
    """

    score: Literal["softmax", "sigmoid"]
    bias: bool = True
    normalise: bool = True
    added: float = 0.0
    smallest: float = 0.0
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 2
    """2 in DeepSeek-V3's report (arXiv:2412.19437, section 2.1.2), 1 in DeepSeek-V2's (arXiv:2405.04434, section 2.1.2)."""
    balanced_score: Literal["softmax", "sigmoid"] | None = None
    """The score that the balancing loss uses; None: `score`."""
    no_memory_formula = None  # it has none for experts, however they are chosen

    def edit(self, spec: Any, parts: Parts) -> None:
        """Our router chooses the experts."""
        mlp_of(spec).router = bound(Router, routing=self)


class Router(TopKRouter):
    """Chooses `moe_router_topk` experts per token, as `routing` says, or as Megatron does where that is None."""

    def __init__(self, config: TransformerConfig, *args: Any, routing: Routing | None = None, **given: Any) -> None:
        super().__init__(config, *args, **given)
        self.choice = routing
        score = config.moe_router_score_function
        if routing is not None:
            refuse_without_effect(config, routing)
            score = routing.balanced_score or routing.score
            if routing.bias and self.expert_bias is None:
                del self.expert_bias
                self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts, dtype=torch.float32))
        self.losses = RouterLosses(config, score=score, group=self.tp_cp_group)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [tokens / s, 1, experts], padding_mask [tokens / s, 1], True for padding; None: there is none.

        Returns weights [tokens / s, experts], zero where not chosen, and the choice, bool.
        """
        flat, real = logits.flatten(0, 1), None if padding_mask is None else ~padding_mask.flatten()
        if self.choice is None:
            weights, chosen = super().routing(logits)
        else:
            weights, chosen = choose(flat, self.topk, self.choice, self.expert_bias)
        # Not in the first pass of a recomputed layer, which has no gradients; the second pass has.
        if self.losses.wanted and self.training and torch.is_grad_enabled():
            weights = self.losses.attach(weights, flat, real)
        super()._apply_expert_bias(chosen if real is None else chosen & real[:, None])
        return weights, chosen

    def is_aux_loss_enabled(self) -> bool:
        """False: Megatron's own losses are off, and `losses` replaces them."""
        return False

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Returns logits unchanged: the z-loss is in `losses`."""
        return logits

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Does nothing, because Megatron's `routing` calls it and would count padding; ours calls Megatron's method."""


def refuse_without_effect(config: TransformerConfig, routing: Routing) -> None:
    """UserError for settings of model.megatron that only Megatron's own choice of experts reads."""
    supported: dict[str, tuple[Any, ...]] = {
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
                f"model.megatron.{name}={value!r}: this model's choice of experts supports only "
                f"{' and '.join(map(repr, values))}; remove the setting"
            )


def choose(logits: Tensor, top_k: int, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [tokens, experts], bias [experts] -> weights [tokens, experts], zero where not chosen, and the choice, bool.

    No gradient passes through the choice.
    Source: DeepseekV2TopkRouter, DeepseekV3TopkRouter and Ernie4_5_MoeTopKRouter of transformers.
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
    """scores [tokens, experts], with minus infinity outside each token's best groups."""
    grouped = scores.view(len(scores), routing.groups, -1)
    best = grouped.topk(routing.group_best, dim=-1).values.sum(-1).topk(routing.chosen_groups, dim=-1).indices
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
