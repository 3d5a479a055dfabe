"""Log-probabilities over a sharded vocabulary in plain torch: all logits exist at once, and autograd differentiates them.

Tensor ranks communicate twice, and each sum has its gradient beside it: the softmax's denominators and the targets' logits are summed in
the forward pass, the gradient of the hidden states in the backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def log_probabilities_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, shard: Any
) -> Tensor:
    """The reference form of `token_log_probabilities` in parallel/vocab.py; shapes as there. shard: this rank's share of the vocabulary."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    group = shard.group if shard.ranks > 1 else None
    rows, biases = shard.real_rows(weight), None if bias is None else shard.real_rows(bias)
    logits = F.linear(hidden if group is None else _SumGradient.apply(hidden, group), rows, biases).to(exact)
    if shard.softcap is not None:
        logits = shard.softcap * torch.tanh(logits / shard.softcap)
    local = targets.to(hidden.device) - shard.first_row
    mine = (local >= 0) & (local < len(rows))
    # A rank may have no rows but padding.
    largest = logits.detach().amax(-1) if len(rows) else logits.new_full(logits.shape[:1], -torch.inf)
    chosen = logits.gather(1, local.clamp(0, len(rows) - 1)[:, None])[:, 0] if len(rows) else logits.sum(-1)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(logits - largest[:, None]).exp().sum(-1), chosen.where(mine, 0)])
    total, chosen = sums if group is None else _Sum.apply(sums, group)
    return (chosen - largest - total.log()).where(targets.to(hidden.device) >= 0, 0)


class _Sum(torch.autograd.Function):
    """Sum over ranks, which all of them use alike, so that the gradient of every summand is the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _SumGradient(torch.autograd.Function):
    """The same tensor on every rank. Each rank has a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
