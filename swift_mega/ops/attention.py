"""Causal attention over examples that lie one after another in a row: no token sees another example.

On CUDA this is flash-attn's varlen kernel. On CPU the forward pass is torch's flash kernel per example, and the backward pass
is ours: torch's runs at a third of the machine's speed, while the five products of the gradient, taken for a block of
queries over just the keys that it sees, run at nearly all of it. Elsewhere it is torch's attention per example. None
builds a [tokens, tokens] matrix over the whole row.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swift_mega.ops.alibi import bias, with_positions
from swift_mega.ops.flash import flash, key_heads_at_once, suits
from swift_mega.ops.sinks import add_sinks, sink_gradient

LOG2_E = 1 / math.log(2)
SHORT = 144  # tokens of the examples whose gradient is left to torch's kernel: fewer calls count for more there
QUERY_BLOCK = (
    96  # queries of one block of the CPU's backward pass: enough rows for a fast product, few keys seen in vain
)


@functools.cache
def _flash_varlen() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _flash_kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """flash-attn's forward and backward pass one by one, which also speak of the log-sum-exp."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
    except ImportError:
        return None
    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every token to the tokens before it, and itself, in its own example.

    query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim], heads a multiple of kv_heads.
    value may have a smaller head_dim, v_head_dim.
    bounds: first token of each example and the end of the last, on the host; cu_seqlens: the same as int32 on the device.
    window: a token sees itself and window - 1 tokens before it; None sees all.
    softcap: scores s become c tanh(s / c) before the softmax (Gemma 2, arXiv:2408.00118).
    alibi: [heads] float32, what a score gains for each position of its key (ops/alibi.py).
    sinks: [heads], a logit that joins each softmax and has no value (ops/sinks.py).
    Returns [tokens, heads, v_head_dim].
    """
    assert alibi is None or (softcap is None and sinks is None), "no model has both, and kernels differ in their order"
    narrow = query.dtype not in (torch.float32, torch.float64)
    if alibi is not None and not narrow and query.device.type == "cpu":
        query, key = with_positions(query, key, alibi, bounds=bounds, scale=scale)
        alibi = None
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:  # the kernels know one size; what is added takes no part in the scores, and is cut off again
        out = attention(
            query, key, F.pad(value, (0, missing)), bounds=bounds, cu_seqlens=cu_seqlens, scale=scale, window=window,
            softcap=softcap, alibi=alibi, sinks=sinks,
        )  # fmt: skip
        return out[..., :-missing]
    # Narrow dtypes stay with torch, whose kernels keep their sums in float32.
    if query.device.type == "cpu" and not narrow and query.shape[-1] == value.shape[-1] and softcap is None:
        return _CpuAttention.apply(query, key, value, tuple(bounds), scale, window, sinks)
    longest = max(end - start for start, end in _examples(bounds))
    kernels = _flash_kernels() if suits(query) and alibi is None and _one_by_one(query, key, sinks) else None
    if kernels is not None:
        forward, backward = kernels
        return flash(
            query, key, value, sinks, cu_seqlens=cu_seqlens, longest=longest, scale=scale, window=window, softcap=softcap,
            forward=forward, backward=backward,
        )  # fmt: skip
    varlen = _flash_varlen() if suits(query) and sinks is None else None
    if varlen is None:
        return attention_reference(
            query, key, value, bounds=bounds, scale=scale, window=window, softcap=softcap, alibi=alibi, sinks=sinks
        )
    return varlen(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
        **({} if softcap is None else {"softcap": softcap}), **({} if alibi is None else {"alibi_slopes": alibi}),
    )  # fmt: skip


def _one_by_one(query: Tensor, key: Tensor, sinks: Tensor | None) -> bool:
    """Whether flash-attn's kernels are called by us: with sinks, and where the gradient is better taken a few heads at a time."""
    if sinks is not None:
        return True
    tokens, heads, head_dim = query.shape
    few = key_heads_at_once(tokens, tokens, heads, key.shape[1], head_dim, query.element_size())
    return torch.is_grad_enabled() and head_dim % 8 == 0 and few < key.shape[1]  # the public function pads other sizes


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: Sequence[int], scale: float, window: int | None,
    softcap: float | None = None, alibi: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attention` in torch; shapes as there."""
    if alibi is not None and query.dtype not in (torch.float32, torch.float64):  # positions need more digits
        wide = (x.float() for x in (query, key, value))
        return attention_reference(*wide, bounds=bounds, scale=scale, window=window, alibi=alibi).to(query.dtype)
    outs = []
    for start, end in _examples(bounds):
        if softcap is not None or sinks is not None:
            outs.append(_by_blocks(query[start:end], key[start:end], value[start:end], scale, window, softcap, sinks))
            continue
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        banded = window is not None and end - start > window
        mask = _seen(end - start, window, query.device) if banded else None
        if alibi is not None:
            seen = _seen(end - start, window, query.device)
            mask = bias(alibi.to(q.dtype), end - start).masked_fill(~seen, -torch.inf)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask,
            is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """One example whose scores are more than a product, a block of queries at a time; they are computed again for the gradient."""
    keys, values = (x.transpose(0, 1) for x in (key, value))
    blocks = []
    for first, _, start, end in _blocks(len(query), len(query), window):
        given = (_grouped(query[start:end], len(keys)), keys[:, first:end], values[:, first:end])
        out = checkpoint(
            _block, *given, scale, window, softcap, sinks, end - start, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
        blocks.append(out.view(query.shape[1], end - start, -1).transpose(0, 1))
    return torch.cat(blocks)


def _block(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, queries: int,
) -> Tensor:  # fmt: skip
    """query: [kv_heads, heads / kv_heads * queries, head_dim]; key, value: [kv_heads, keys, head_dim] -> like query."""
    scores = torch.bmm(query, key.transpose(1, 2)).mul(scale)
    if softcap is not None:
        scores = scores.div(softcap).tanh().mul(softcap)
    keys = key.shape[1]
    distance = torch.arange(keys - queries, keys, device=key.device)[:, None] - torch.arange(keys, device=key.device)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    shown = scores.view(len(key), -1, queries, keys).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(shown.dtype).view(len(key), -1, 1, 1).expand(-1, -1, queries, -1)
        shown = torch.cat((shown, column), -1)
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = shown.softmax(-1, dtype=exact)[..., :keys].to(value.dtype)
    return torch.bmm(weights.reshape(scores.shape), value)


class _CpuAttention(torch.autograd.Function):
    """A whole row at once; every example writes its part of the results."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[1], query.shape[0])
        for start, end in _examples(bounds):
            q, k, v = (_heads_first(x, start, end) for x in (query, key, value))
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, **_kernel_mask(q, window), scale=scale
            )
            out[start:end] = part[0].transpose(0, 1)
            lse[:, start:end] = part_lse[0]
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.bounds, ctx.scale, ctx.window = bounds, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        towards = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        for start, end in _examples(ctx.bounds):
            gradients_of_keys(
                gradients[0][start:end], query[start:end], key[start:end], value[start:end], out[start:end], lse[:, start:end],
                into=tuple(x[start:end] for x in towards), scale=ctx.scale, window=ctx.window,
            )  # fmt: skip
        towards_sinks = sink_gradient(gradients[0], out, lse, sinks[0]) if sinks else None
        return *towards, None, None, None, towards_sinks


def gradients_of_keys(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *, into: tuple[Tensor, ...], scale: float, window: int | None, causal: bool = True, add: bool = False,
) -> None:  # fmt: skip
    """The gradients of query, key and value that come of these keys, in float32 or float64 on CPU.

    The last query stands at the last key; there may be fewer queries than keys, and without `causal` more. out [queries, heads,
    value_dim] and lse [heads, queries] are the whole softmax's, which may have further keys. grad: of out. into: written to, or
    with `add` added to.
    """
    alike = len(query) == len(key) if causal else window is None
    short = max(len(query), len(key)) <= SHORT and alike and query.shape[-1] == value.shape[-1]
    backward, write = _kernel_backward if short else _blocked_backward, Tensor.add_ if add else Tensor.copy_
    backward(grad, query, key, value, out, lse, into=into, scale=scale, window=window, causal=causal, write=write)


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *, into: tuple[Tensor, ...], scale: float, window: int | None, causal: bool, write: Callable[[Tensor, Tensor], Tensor],
) -> None:  # fmt: skip
    """Gradients by torch's kernel; causal only for one example's queries and keys, as is a window."""
    g, q, k, v, o = (_heads_first(x) for x in (grad, query, key, value, out))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, q, k, v, o, lse[None], 0.0, **_kernel_mask(q, window, causal), scale=scale
    )
    for target, part in zip(into, found, strict=True):
        write(target, part[0].transpose(0, 1))


def _blocked_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    *, into: tuple[Tensor, ...], scale: float, window: int | None, causal: bool, write: Callable[[Tensor, Tensor], Tensor],
) -> None:  # fmt: skip
    """Gradients from the softmax computed again by blocks of queries."""
    keys, values = (x.transpose(0, 1).contiguous() for x in (key, value))
    towards_keys, towards_values = torch.zeros_like(keys), torch.zeros_like(values)
    lse2 = lse * LOG2_E  # powers of two take half the time of exp
    for first, end, start, stop in _blocks(len(query), len(key), window, causal):
        # [kv_heads, queries_per_group * block, head_dim]: the queries that share keys are rows of one product.
        q, g, o = (_grouped(x[start:stop], len(keys)) for x in (query, grad, out))
        q = q * (scale * LOG2_E)
        k, v = keys[:, first:end], values[:, first:end]
        weights = torch.bmm(q, k.transpose(1, 2)).sub_(lse2[:, start:stop].reshape(len(keys), -1, 1)).exp2_()
        _hide(weights.view(-1, stop - start, end - first), len(key) - len(query) + start - first, window, causal)
        towards_values[:, first:end].baddbmm_(weights.transpose(1, 2), g)
        mean = (g * o).sum(-1, keepdim=True)
        scores = torch.bmm(g, v.transpose(1, 2)).sub_(mean).mul_(weights)
        towards_keys[:, first:end].baddbmm_(scores.transpose(1, 2), q)
        rows = torch.bmm(scores, k).view(query.shape[1], stop - start, -1)
        write(into[0][start:stop], rows.mul_(scale).transpose(0, 1))
    write(into[1], towards_keys.div_(LOG2_E).transpose(0, 1))  # q carried it
    write(into[2], towards_values.transpose(0, 1))


def _examples(bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(bounds, bounds[1:], strict=False)


def _blocks(queries: int, keys: int, window: int | None, causal: bool = True) -> Iterator[tuple[int, int, int, int]]:
    """(first key seen, end of keys, first query, end of queries) of each block; the last query stands at the last key."""
    ahead = keys - queries
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        first = 0 if window is None else max(0, start + ahead - window + 1)
        yield first, stop + ahead if causal else keys, start, stop


def _heads_first(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, end - start, head_dim], a view."""
    return x[start:end].transpose(0, 1)[None]


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [kv_heads, heads / kv_heads * tokens, head_dim]."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1])


def _kernel_mask(query: Tensor, window: int | None, causal: bool = True) -> dict[str, Any]:
    """What torch's kernels are told of causality and window; a mask is added to scores. query: [1, heads, length, head_dim]."""
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": causal, "attn_mask": None}
    seen = _seen(length, window, query.device)
    return {"is_causal": False, "attn_mask": query.new_zeros(length, length).masked_fill_(~seen, -torch.inf)}


def _hide(weights: Tensor, ahead: int, window: int | None, causal: bool) -> None:
    """Zero for keys that the query does not see. weights: [heads, queries, keys], the first query at key `ahead`."""
    if causal:
        near = max(ahead, 0)
        weights[..., near:].tril_(ahead - near)  # no other key lies after a query
    if window is not None:
        weights.triu_(ahead - window + 1)


@functools.lru_cache(maxsize=8)
def _seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool: True where the query may see the key."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
