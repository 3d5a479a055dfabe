"""Attention on the CPU in float32 and float64: torch's flash kernel forward, our own matrix products backward.

torch's backward kernel reaches a third of the CPU's speed. Here the gradient is five products per block of queries, over the keys which
that block sees. They reach nearly full speed. A window is handled one tile of queries at a time, so no mask is larger than [QUERY_TILE,
QUERY_TILE + window].
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.sinks import add_sinks, sink_gradient

LOG2_E = 1 / math.log(2)
SHORT = 144
"""Longest example, in tokens, whose gradient is left to torch's kernel. For short examples the number of calls matters more."""
QUERY_BLOCK = 96
"""Queries in one block of the backward pass: enough for a fast product, and few keys that no query of the block sees."""
QUERY_TILE = 128
"""Queries in one call of the forward pass where it needs a mask."""
SMALL_MASK = 1 << 16
"""Numbers of the largest mask that is cached."""


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention within each example of a row; shapes as in `ops.attention.attention`, one head_dim for keys and values."""
    return _CpuAttention.apply(query, key, value, tuple(bounds), scale, window, sinks)  # type: ignore[no-any-return]


class _CpuAttention(torch.autograd.Function):
    """One autograd node for a whole row; each example writes its part of the results."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: tuple[int, ...],
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[1], query.shape[0])
        left = None if window is None else window - 1
        for start, end in pairwise(bounds):
            given = (x[start:end] for x in (query, key, value))
            out[start:end], lse[:, start:end] = part_forward(*given, scale=scale, causal=True, left=left)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.bounds, ctx.scale, ctx.window = bounds, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        for start, end in pairwise(ctx.bounds):
            gradients_of_keys(
                gradients[0][start:end],
                query[start:end],
                key[start:end],
                value[start:end],
                out[start:end],
                lse[:, start:end],
                into=tuple(x[start:end] for x in found),
                scale=ctx.scale,
                window=ctx.window,
            )
        grad_sinks = sink_gradient(gradients[0], out, lse, sinks[0]) if sinks else None
        return *found, None, None, None, grad_sinks


def part_forward(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, left: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys that are aligned at their ends: query i with key i + keys - queries.

    causal: a query sees no key after the one it is aligned with.
    left: a query sees no key more than this many places before the one it is aligned with (None: no limit).
    Returns out [queries, heads, value_dim] and the log-sum-exp [heads, queries].
    """
    queries, keys = len(query), len(key)
    left = None if left is None or left >= keys - 1 else left
    if left is None and (not causal or queries == keys):
        return _kernel_forward(query, key, value, scale, causal, None)
    ahead, found = keys - queries, []
    for start in range(0, queries, QUERY_TILE):
        stop = min(start + QUERY_TILE, queries)
        first = 0 if left is None else max(0, start + ahead - left)
        last = stop + ahead if causal else keys
        mask = _tile_mask(stop - start, last - first, start + ahead - first, causal, left, query.dtype)
        found.append(_kernel_forward(query[start:stop], key[first:last], value[first:last], scale, False, mask))
    if len(found) == 1:
        return found[0]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], 1)


def _kernel_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_heads_first(x) for x in (query, key, value)), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), lse[0]


def _tile_mask(queries: int, keys: int, ahead: int, causal: bool, left: int | None, dtype: torch.dtype) -> Tensor:
    """[queries, keys], added to the scores: -inf where the query does not see the key. Query i is aligned with key i + ahead."""
    make = _small_mask if queries * keys <= SMALL_MASK else _mask
    return make(queries, keys, ahead, causal, left, dtype)


def _mask(queries: int, keys: int, ahead: int, causal: bool, left: int | None, dtype: torch.dtype) -> Tensor:
    hidden = torch.full((queries, keys), -torch.inf, dtype=dtype)
    mask = hidden.triu(ahead + 1) if causal else torch.zeros_like(hidden)
    return mask if left is None else mask.add_(hidden.tril(ahead - left - 1))


# Short examples of equal length need the same mask many times, and building it takes as long as their attention.
_small_mask = functools.lru_cache(maxsize=64)(_mask)


def gradients_of_keys(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    into: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    causal: bool = True,
    add: bool = False,
) -> None:
    """The gradients of query, key and value due to these keys.

    The last query is aligned with the last key. There may be fewer queries than keys, and without `causal` also more.
    out [queries, heads, value_dim] and lse [heads, queries] are those of the whole softmax, which may have further keys.
    grad: of out. into: the gradients are written to these three tensors, or added to them with `add`.
    """
    alike = len(query) == len(key) if causal else window is None
    short = max(len(query), len(key)) <= SHORT and alike and query.shape[-1] == value.shape[-1]
    backward, write = _kernel_backward if short else _blocked_backward, Tensor.add_ if add else Tensor.copy_
    backward(grad, query, key, value, out, lse, into=into, scale=scale, window=window, causal=causal, write=write)


def _kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    into: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    causal: bool,
    write: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Gradients by torch's kernel, for at most SHORT tokens. Causal or windowed only where queries and keys are the same tokens of one
    example.
    """
    g, q, k, v, o = (_heads_first(x) for x in (grad, query, key, value, out))
    length, mask = len(query), None
    if window is not None and length > window:
        mask, causal = _tile_mask(length, length, 0, True, window - 1, query.dtype), False
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, lse[None], 0.0, causal, attn_mask=mask, scale=scale
    )
    for target, part in zip(into, found, strict=True):
        write(target, part[0].transpose(0, 1))


def _blocked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    into: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    causal: bool,
    write: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Gradients from a recomputed softmax, one block of queries at a time."""
    keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    lse2 = lse * LOG2_E  # exp2 takes half the time of exp
    for first, end, start, stop in _blocks(len(query), len(key), window, causal):
        # [kv_heads, queries_per_group * block, head_dim]: queries that share a key head are the rows of one product.
        q, g, o = (_grouped(x[start:stop], len(keys)) for x in (query, grad, out))
        q = q * (scale * LOG2_E)
        k, v = keys[:, first:end], values[:, first:end]
        weights = torch.bmm(q, k.transpose(1, 2)).sub_(lse2[:, start:stop].reshape(len(keys), -1, 1)).exp2_()
        _hide(weights.view(-1, stop - start, end - first), len(key) - len(query) + start - first, window, causal)
        grad_values[:, first:end].baddbmm_(weights.transpose(1, 2), g)
        mean = (g * o).sum(-1, keepdim=True)
        scores = torch.bmm(g, v.transpose(1, 2)).sub_(mean).mul_(weights)
        grad_keys[:, first:end].baddbmm_(scores.transpose(1, 2), q)
        rows = torch.bmm(scores, k).view(query.shape[1], stop - start, -1)
        write(into[0][start:stop], rows.mul_(scale).transpose(0, 1))
    # q was multiplied by LOG2_E above.
    write(into[1], grad_keys.div_(LOG2_E).transpose(0, 1))
    write(into[2], grad_values.transpose(0, 1))


def _blocks(queries: int, keys: int, window: int | None, causal: bool = True) -> Iterator[tuple[int, int, int, int]]:
    """(first key seen, end of keys, first query, end of queries) of each block. The last query is aligned with the last key."""
    ahead = keys - queries
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        first = 0 if window is None else max(0, start + ahead - window + 1)
        yield first, stop + ahead if causal else keys, start, stop


def _heads_first(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, tokens, head_dim], a view."""
    return x.transpose(0, 1)[None]


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [kv_heads, heads / kv_heads * tokens, head_dim]."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1])


def _hide(weights: Tensor, ahead: int, window: int | None, causal: bool) -> None:
    """Sets weights to zero, in place, where the query does not see the key.

    weights: [heads, queries, keys]; the first query is aligned with key `ahead`.
    """
    if causal:
        near = max(ahead, 0)
        weights[..., near:].tril_(ahead - near)  # keys before `near` come before every query
    if window is not None:
        weights.triu_(ahead - window + 1)
