"""Attention over the context axis: Ulysses, ring, both as a mesh, or all keys gathered."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from swift_mega.parallel.gathered import gathered_attention
from swift_mega.parallel.ring import ring_attention
from swift_mega.parallel.sequence import Mesh, key_copies, ring_blocks
from swift_mega.parallel.ulysses import heads_to_tokens, tokens_to_heads


@dataclass(frozen=True)
class Context:
    """The mesh of the context axis, and this rank's groups in it. gather: keys do not go round the ring, all are gathered."""

    mesh: Mesh
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup
    gather: bool = False


def make_context(ranks: list[list[int]], mesh: Mesh, *, gather: bool = False) -> Context:
    """The groups of the mesh for this rank. Collective over all ranks of the job.

    ranks: the ranks of every context group, in the order of the axis.
    """
    mine, me = None, dist.get_rank()
    for group in ranks:
        assert len(group) == mesh.size, (group, mesh)
        inner = [group[first : first + mesh.ulysses] for first in range(0, mesh.size, mesh.ulysses)]
        outer = [group[place :: mesh.ulysses] for place in range(mesh.ulysses)]
        made = [[dist.new_group(each) for each in some] for some in (inner, outer)]
        if me in group:
            place, position = mesh.place(group.index(me))
            mine = Context(mesh, made[0][position], made[1][place], gather)
    assert mine is not None, "this rank is in no context group"
    return mine


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, *, context: Context, cu_seqlens: tuple[int, ...], scale: float, causal: bool = True,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention within the examples of a row whose tokens lie on the ranks of the context axis. Collective.

    query [tokens, heads, head_dim], key [tokens, kv_heads, head_dim], value [tokens, kv_heads, value_dim]: of this rank's tokens, as
    `sequence.pieces` says. cu_seqlens: where examples begin in the whole row, and its end. Returns [tokens, heads, value_dim].
    """
    inner, mesh = context.ulysses, context.mesh
    copies = key_copies(key.shape[1], mesh.ulysses)
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    query, key, value = (tokens_to_heads(x, inner) for x in (query, key, value))
    if sinks is not None and mesh.ulysses > 1:
        sinks = sinks.chunk(mesh.ulysses)[inner.rank()]
    steps = ring_blocks(cu_seqlens, mesh.ring, context.ring.rank(), causal=causal, window=window)
    attend = gathered_attention if context.gather else ring_attention
    out = attend(query, key, value, steps=steps, group=context.ring, scale=scale, softcap=softcap, sinks=sinks)
    return heads_to_tokens(out, inner)
