"""Ulysses (arXiv:2309.14509): ranks exchange some tokens with all heads for all tokens with some heads, and back.

An exchange of [tokens, heads, dim] sends (u - 1) / u of it from each of u ranks, in its own dtype. There are four exchanges forward
(query, key, value and the result) and four backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, heads, dim] of this rank's tokens -> [u * tokens, heads / u, dim] of its heads, tokens in the order of ranks. Collective."""
    ranks = group.size()
    if ranks == 1:
        return x
    tokens, heads, dim = x.shape
    by_rank = x.reshape(tokens, ranks, heads // ranks, dim).transpose(0, 1)
    return _Exchange.apply(by_rank, group).reshape(ranks * tokens, heads // ranks, dim)  # type: ignore[no-any-return]


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Inverse of `tokens_to_heads`. Collective."""
    ranks = group.size()
    if ranks == 1:
        return x
    tokens, heads, dim = x.shape[0] // ranks, x.shape[1], x.shape[2]
    by_rank = _Exchange.apply(x.reshape(ranks, tokens, heads, dim), group)
    return by_rank.transpose(0, 1).reshape(tokens, ranks * heads, dim)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """[ranks, ...]: part i goes to rank i. The gradient goes back by the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    return found
