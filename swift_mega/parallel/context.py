"""Attention over the context axis: Ulysses, ring, a mesh of both, or all keys gathered."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.ops.attention import attention
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.parallel.gathered import gathered_attention
from swift_mega.parallel.mesh import Mesh, key_copies
from swift_mega.parallel.ring import ring_attention
from swift_mega.parallel.sequence import local_tokens, ring_steps
from swift_mega.parallel.ulysses import heads_to_tokens, tokens_to_heads


@dataclass(frozen=True)
class Context:
    """The mesh of the context axis, this rank's number on the axis, and its two groups in the mesh."""

    mesh: Mesh
    rank: int
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup


def make_context(ranks: list[list[int]], mesh: Mesh, *, timeout: timedelta | None = None) -> Context:
    """The groups of the mesh for this rank. Collective over all ranks of the job.

    ranks: the ranks of every context group, in the order of the axis. timeout: of a collective; None: the backend's default.
    """
    mine, me = None, dist.get_rank()
    for group in ranks:
        assert len(group) == mesh.size, (group, mesh)
        inner = [group[first : first + mesh.ulysses] for first in range(0, mesh.size, mesh.ulysses)]
        outer = [group[place :: mesh.ulysses] for place in range(mesh.ulysses)]
        made = [[dist.new_group(each, timeout=timeout) for each in some] for some in (inner, outer)]
        if me in group:
            place, ring_rank = mesh.place(group.index(me))
            mine = Context(mesh, group.index(me), made[0][ring_rank], made[1][place])
    assert mine is not None, "this rank is in no context group"
    return mine


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    context: Context,
    cu_seqlens: tuple[int, ...],
    starts: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """Attention within the examples of a packed row whose tokens are sharded over the context ranks. Collective.

    query [tokens, heads, head_dim], key [tokens, kv_heads, head_dim], value [tokens, kv_heads, value_dim]: of this rank's tokens, which
    `sequence.pieces` gives.
    cu_seqlens: where examples begin in the whole row, and its end, on the host; starts: the same as int32 on the device.
    Returns [tokens, heads, value_dim].
    """
    inner, mesh = context.ulysses, context.mesh
    copies = key_copies(key.shape[1], mesh.ulysses)
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    query, key, value = (tokens_to_heads(x, inner) for x in (query, key, value))
    if sinks is not None and mesh.ulysses > 1:
        sinks = sinks.chunk(mesh.ulysses)[inner.rank()]
    if mesh.ring == 1 and causal:  # this rank has all keys
        out = attention(
            query,
            key,
            value,
            bounds=cu_seqlens,
            cu_seqlens=starts,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            kernels=kernels,
        )
        return heads_to_tokens(out, inner)
    steps = ring_steps(cu_seqlens, mesh.ring, context.ring.rank(), causal=causal, window=window)
    attend = gathered_attention if mesh.gather else ring_attention
    out = attend(
        query,
        key,
        value,
        steps=steps,
        group=context.ring,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        kernels=kernels,
    )
    return heads_to_tokens(out, inner)


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
        x = x.clone()
        for group in groups:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def sum_over_context(x: Tensor, context: Context | None) -> Tensor:
    """The sum of `x` over the context ranks of a row, on each of them. Collective.

    What all of them compute from the sum is the same, and counts once. So the gradient of each rank's `x` is the gradient of the sum, and
    is not summed over ranks: Megatron sums the parameters' gradients over context ranks.
    """
    return x if context is None else _SumOverContext.apply(x, (context.ulysses, context.ring))


def gather_row(x: Tensor, context: Context | None, cu_seqlens: Sequence[int]) -> Tensor:
    """[tokens, ...] of each context rank -> the whole row, in its order, on every context rank. No gradient. Collective.

    cu_seqlens: where examples begin in the whole row, and its end.
    """
    if context is None:
        return x
    mesh, parts = context.mesh, x.contiguous()
    for group in (context.ulysses, context.ring):
        found = parts.new_empty(group.size() * len(parts), *parts.shape[1:])
        dist.all_gather_into_tensor(found, parts, group=group)
        parts = found
    order = torch.cat([local_tokens(cu_seqlens, mesh, rank) for rank in range(mesh.size)]).to(x.device)
    return torch.empty_like(parts).index_copy_(0, order, parts)
