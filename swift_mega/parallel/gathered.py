"""Attention with the keys and values of all context ranks gathered: one collective each way in place of the messages of a ring.

In the forward pass a rank receives (r - 1) of r parts of K and V in their own dtype. In the backward pass it receives them again, and
sends as much of dK and dV in float32. Its memory grows with the whole row: kv_heads * (head_dim + value_dim) numbers per token. For few
key heads that is little.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.ops.blocks import Block, Gradients, Parts, backward, forward
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.ops.sinks import sink_gradient
from swift_mega.parallel.sequence import Step


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    steps: Sequence[Step],
    group: dist.ProcessGroup,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """Same arguments and result as `ring_attention`. Collective."""
    shown = _in_gathered(steps, group, len(key))
    return _Gathered.apply(query, key, value, sinks, shown, group, scale, softcap, kernels)  # type: ignore[no-any-return]


def _in_gathered(steps: Sequence[Step], group: dist.ProcessGroup, keys: int) -> list[Block]:
    """The blocks of all steps, with their keys counted in the gathered keys, which are in the order of ranks."""
    rank, size = group.rank(), group.size()
    return [
        dataclasses.replace(one, k=one.k + (rank - step.behind) % size * keys) for step in steps for one in step.blocks
    ]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        shown: Sequence[Block],
        group: dist.ProcessGroup,
        scale: float,
        softcap: float | None,
        kernels: Kernels,
    ) -> Tensor:
        parts = Parts(query, value.shape[-1])
        forward(
            parts, query, _all(key, group), _all(value, group), shown, scale=scale, softcap=softcap, kernels=kernels
        )
        out, lse = parts.finished(sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.given = shown, group, scale, softcap, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        shown, group, scale, softcap, kernels = ctx.given
        keys, values = (_all(x, group) for x in (key, value))
        grads = Gradients(*(torch.zeros_like(x, dtype=lse.dtype) for x in (query, keys, values)))
        backward(
            grads, gradients[0], query, keys, values, out, lse, shown, scale=scale, softcap=softcap, kernels=kernels
        )
        mine = [_summed(x, group) for x in (grads.key, grads.value)]
        grad_sinks = sink_gradient(gradients[0], out, lse, sinks[0]) if sinks else None
        found = (grads.query.to(query.dtype), mine[0].to(key.dtype), mine[1].to(value.dtype), grad_sinks)
        return *found, None, None, None, None, None


def _all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[tokens, ...] of each rank -> [ranks * tokens, ...]."""
    found = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(found, x.contiguous(), group=group)
    return found


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks * tokens, ...] -> [tokens, ...]: this rank's part of the sum over ranks."""
    found = x.new_empty(len(x) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(found, x, group=group)
    return found
