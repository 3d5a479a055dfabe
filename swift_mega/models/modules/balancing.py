"""The losses on a router's logits: how evenly tokens are spread over experts, and how large the logits are (z-loss).

For a microbatch of T tokens (padding left out), E experts, k of them chosen per token, and one layer:

    balance = E * sum over experts e of f_e * P_e,  f_e = tokens that choose e / (k T),  P_e = mean score of e
    z       = mean over tokens of logsumexp(logits)^2

Training minimises loss + coefficient * (sum over MoE layers of the mean over microbatches). f and T count the whole packed row, over all
tensor and context ranks that share it; no gradient passes through f. `balance` is 1 where experts are used evenly. It equals transformers'
`load_balancing_loss_func` on one layer's logits, divided by k. Sources: arXiv:2101.03961 eq. 4 to 6 (k = 1), arXiv:2202.08906 eq. 5.

Megatron divides all gradients by the trained tokens of the global batch. So a microbatch's losses are multiplied by `weight`, the trained
tokens per microbatch. Megatron's own factors count all tokens of one rank, padding included.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swift_mega.errors import UserError

BALANCE, Z = "load_balancing_loss", "z_loss"
"""Names of the losses in logging.jsonl."""


def balancing_fields(coefficient: float, given: Mapping[str, Any], *, experts: bool) -> dict[str, Any]:
    """Fields of TransformerConfig for the balancing loss; UserError for settings that contradict each other or have no effect.

    coefficient: model.router_aux_loss_coefficient. given: model.megatron, which may set the same by Megatron's own fields.
    """
    named = {
        "model.router_aux_loss_coefficient": coefficient or None,
        "model.megatron.moe_aux_loss_coeff": given.get("moe_aux_loss_coeff") or None,
    }
    settings = {name: value for name, value in named.items() if value is not None}
    z = {"model.megatron.moe_z_loss_coeff": given.get("moe_z_loss_coeff")}
    for name, value in {**settings, **{name: value for name, value in z.items() if value is not None}}.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise UserError(f"{name}={value!r}: expected a number of at least 0")
        if not experts:
            raise UserError(f"{name}={value:g}: this model has no experts; remove it")
    if len(set(settings.values())) > 1:
        raise UserError(
            f"{' and '.join(f'{k}={v:g}' for k, v in settings.items())} are one setting; remove one of them"
        )
    loss = next(iter(settings.values()), 0.0)
    kind = given.get("moe_router_load_balancing_type", "aux_loss" if loss else "none")
    if kind not in ("none", "aux_loss"):
        raise UserError(
            f"model.megatron.moe_router_load_balancing_type={kind!r}: what it balances depends on the tokens that a rank has, so "
            "layouts would train different models; known here: 'none' and 'aux_loss'"
        )
    if (kind == "aux_loss") != bool(loss):
        reason = "without a coefficient has no effect; set model.router_aux_loss_coefficient, or remove it"
        against = "excludes the balancing loss that model.router_aux_loss_coefficient asks for; remove one of them"
        raise UserError(f"model.megatron.moe_router_load_balancing_type={kind!r} {against if loss else reason}")
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": loss} if experts else {}


def has_router_losses(config: TransformerConfig) -> bool:
    """Whether training adds a loss of the routers; the same on every rank."""
    return bool(config.num_moe_experts) and (
        config.moe_router_load_balancing_type == "aux_loss" or bool(config.moe_z_loss_coeff)
    )


class RouterLosses:
    """The losses of one router.

    score: an expert's score is the "softmax" of the logits, or the "sigmoid" of its logit divided by the sum over experts.
    group: the ranks that share a row's tokens.
    """

    def __init__(self, config: TransformerConfig, *, score: str, group: Any) -> None:
        self.balance = config.moe_aux_loss_coeff if config.moe_router_load_balancing_type == "aux_loss" else 0.0
        self.z = config.moe_z_loss_coeff or 0.0
        self.top_k, self.score, self.group = config.moe_router_topk, score, group
        self.weight = 1.0
        self.sums: dict[str, float | Tensor] = {}

    @property
    def wanted(self) -> bool:
        """Whether any of the losses is on."""
        return bool(self.balance or self.z)

    def start(self, weight: float) -> None:
        """Call before a step. weight: trained tokens per microbatch of its global batch. Clears the sums of the step before."""
        self.weight, self.sums = weight, {}

    def attach(self, weights: Tensor, logits: Tensor, real: Tensor | None) -> Tensor:
        """Returns `weights`; their backward pass adds the gradient of the losses to `logits`. Both are [tokens / ranks, experts].

        real: [tokens / ranks] bool, False where a token is padding; None: there is no padding. Collective over `group`.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.softmax(-1) if self.score == "softmax" else _shares(wide.sigmoid())
        logsums = wide.logsumexp(-1).square()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.top_k, dim=-1).indices, True)
        if real is not None:
            scores, logsums, chosen = scores * real[:, None], logsums * real, chosen & real[:, None]
        counts = chosen.sum(0)
        if self.group.size() > 1:
            dist.all_reduce(counts, group=self.group)
        tokens = counts.sum().clamp(min=1) / self.top_k
        balance = (counts * scores.sum(0)).sum() * (scores.shape[1] / (self.top_k * tokens**2))
        z = logsums.sum() / tokens
        for name, value in ((BALANCE, balance), (Z, z)):
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        total: Tensor = MoEAuxLossAutoScaler.apply(weights, self.weight * (self.balance * balance + self.z * z))
        return total


def _shares(scores: Tensor) -> Tensor:
    """Each token's sigmoids, divided by their sum: arXiv:2412.19437 eq. 20."""
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)
