"""Ring attention (arXiv:2310.01889): keys and values travel around the ring, and the queries of every rank stay.

Each step computes with the keys that are here while the next ones arrive. In the forward pass a rank sends K and V `steps - 1` times:
(steps - 1) * kv_heads * (head_dim + value_dim) numbers per key, in their own dtype. The backward pass recomputes each step's softmax
from the saved log-sum-exp. K and V travel again, and dK and dV follow them in float32, `steps - 1` times and once more to the rank that
has these keys.

`steps` is the ring's size, or less where a window or short examples let no query see the keys of some ring ranks (parallel/sequence.py).
Those ranks are skipped: one message goes to any rank of the ring.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.ops.blocks import Gradients, Parts, backward, forward
from swift_mega.ops.kernels import AUTO, Kernels
from swift_mega.ops.sinks import sink_gradient
from swift_mega.parallel.sequence import Step


def ring_attention(
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
    """Attention of this rank's queries to the keys of all ranks of the ring. Collective.

    query [tokens, heads, head_dim], key [tokens, kv_heads, head_dim], value [tokens, kv_heads, value_dim]: of this rank's tokens.
    steps: which keys of which rank its queries see, from `sequence.ring_steps`; the first step is the rank's own keys.
    sinks: [heads], as in ops.attention. Returns [tokens, heads, value_dim].
    """
    return _Ring.apply(query, key, value, sinks, steps, group, scale, softcap, kernels)  # type: ignore[no-any-return]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        steps: Sequence[Step],
        group: dist.ProcessGroup,
        scale: float,
        softcap: float | None,
        kernels: Kernels,
    ) -> Tensor:
        key, value = key.contiguous(), value.contiguous()
        parts = Parts(query, value.shape[-1])
        here: tuple[Tensor, ...] = (key, value)
        for step, hops in zip(steps, _hops(steps), strict=True):
            coming = _Exchange(here, group, hops) if hops else None
            forward(parts, query, here[0], here[1], step.blocks, scale=scale, softcap=softcap, kernels=kernels)
            here = coming.arrived() if coming else here
        out, lse = parts.finished(sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.given = steps, group, scale, softcap, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        steps, group, scale, softcap, kernels = ctx.given
        exact = lse.dtype
        grad_query = torch.zeros_like(query, dtype=exact)
        here: tuple[Tensor, ...] = (key, value)
        following: _Exchange | None = None
        for step, hops in zip(steps, _hops(steps), strict=True):
            coming = _Exchange(here, group, hops) if hops else None
            sums: tuple[Tensor, ...] = ()
            if step.blocks or following is None:
                grads = Gradients(grad_query, *(torch.zeros_like(x, dtype=exact) for x in here))
                backward(
                    grads,
                    gradients[0],
                    query,
                    here[0],
                    here[1],
                    out,
                    lse,
                    step.blocks,
                    scale=scale,
                    softcap=softcap,
                    kernels=kernels,
                )
                sums = (grads.key, grads.value)
            # Meanwhile the gradients that other ranks computed for these keys have travelled here.
            if following is not None:
                theirs = following.arrived()
                for mine, others in zip(sums, theirs, strict=False):
                    mine.add_(others)
                sums = sums or theirs
            following = _Exchange(sums, group, hops or -step.behind)
            here = coming.arrived() if coming else here
        assert following is not None
        sums = following.arrived()
        grad_sinks = sink_gradient(gradients[0], out, lse, sinks[0]) if sinks else None
        return (
            grad_query.to(query.dtype),
            sums[0].to(key.dtype),
            sums[1].to(value.dtype),
            grad_sinks,
            None,
            None,
            None,
            None,
            None,
        )


def _hops(steps: Sequence[Step]) -> list[int]:
    """How many ranks further the keys are sent after each step; 0 after the last."""
    return [after.behind - step.behind for step, after in itertools.pairwise(steps)] + [0]


class _Exchange:
    """Sends tensors to the rank `hops` further on the ring, and receives those of the rank `hops` before. Does not wait."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, hops: int) -> None:
        size, rank = group.size(), group.rank()
        self.sent, self.works = tuple(tensors), []
        self.coming = self.sent
        if hops % size:
            self.coming = tuple(torch.empty_like(x) for x in tensors)
            ranks = dist.get_process_group_ranks(group)
            there, back = ranks[(rank + hops) % size], ranks[(rank - hops) % size]
            operations = [dist.P2POp(dist.isend, x, there, group) for x in self.sent]
            operations += [dist.P2POp(dist.irecv, x, back, group) for x in self.coming]
            self.works = dist.batch_isend_irecv(operations)

    def arrived(self) -> tuple[Tensor, ...]:
        """Waits until the tensors have come, and until those that were sent may be overwritten. Returns what came."""
        for work in self.works:
            work.wait()
        return self.coming
