"""flash-attn's kernels, called one by one, which also speak of the log-sum-exp; the gradient a few heads at a time where rows are long.

The backward kernel sums dQ in float32 and, where query heads share keys, makes dK and dV for every query head before it adds these up
(mha_varlen_bwd: dq_accum, dk_expanded, dv_expanded): for 32 heads that share 8 of 128 features each that is 32 kB a token, more than
anything else in a layer. Heads do not depend on one another, so a row is differentiated as many key heads at a time as keep that
within AT_ONCE. Kernels of so many tokens fill the device with a single head.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.sinks import add_sinks, sink_gradient

AT_ONCE = 2 << 30
"""Bytes of the backward kernel's own sums."""


def suits(query: Tensor) -> bool:
    """Whether flash-attn's kernels take such tensors."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def key_heads_at_once(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Key heads whose gradient is taken in one call. queries, keys: tokens."""
    shared = heads // kv_heads
    each = shared * head_dim * (4 * queries + (2 * itemsize * keys if shared > 1 else 0))
    return max(1, min(kv_heads, AT_ONCE // max(each, 1)))


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """(query heads, key heads) of each call."""
    heads, kv_heads = query.shape[1], key.shape[1]
    step = key_heads_at_once(len(query), len(key), heads, kv_heads, query.shape[-1], query.element_size())
    shared = heads // kv_heads
    for first in range(0, kv_heads, step):
        last = min(first + step, kv_heads)
        yield slice(first * shared, last * shared), slice(first, last)


def backward_by_heads(
    kernel: Callable[..., Any], grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, settings: dict[str, Any]
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor, Tensor]]]:  # fmt: skip
    """(query heads, key heads, gradients of query, key and value of these heads), call by call.

    kernel: _flash_attn_varlen_backward; it wants features one after another, not heads. Shapes as in `flash`; lse: [heads, tokens].
    """
    for mine, theirs in _parts(query, key):
        q, k, v = query[:, mine], key[:, theirs], value[:, theirs]
        towards = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernel(
            grad[:, mine],
            q,
            k,
            v,
            out[:, mine],
            lse[mine],
            *towards,
            **settings,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        yield mine, theirs, towards


def flash(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, cu_seqlens: Tensor, longest: int, scale: float,
    window: int | None, softcap: float | None, forward: Callable[..., Any], backward: Callable[..., Any],
) -> Tensor:  # fmt: skip
    """Attention by the two kernels, with or without sinks; shapes as in ops.attention.

    forward, backward: _flash_attn_varlen_forward and _flash_attn_varlen_backward of flash_attn.flash_attn_interface (2.7 and newer),
    which take and give the log-sum-exp [heads, tokens]; its public function has no gradient for that.
    """
    settings = dict(
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=0.0,
        softmax_scale=scale, causal=True, window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0, softcap=softcap or 0.0, alibi_slopes=None,
    )  # fmt: skip
    return _Flash.apply(query, key, value, sinks, settings, forward, backward)  # type: ignore[no-any-return]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: dict[str, Any],
        forward: Callable[..., Any], backward: Callable[..., Any],
    ) -> Tensor:  # fmt: skip
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out, lse, *_ = forward(query, key, value, **settings, return_softmax=False)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.settings, ctx.kernel = settings, backward
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        grad = gradients[0].contiguous()
        whole: list[Tensor] | None = None
        for mine, theirs, found in backward_by_heads(ctx.kernel, grad, query, key, value, out, lse, ctx.settings):
            if theirs == slice(0, key.shape[1]):
                whole = list(found)
                break
            if whole is None:
                whole = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
            for target, heads, part in zip(whole, (mine, theirs, theirs), found, strict=True):
                target[:, heads] = part
        assert whole is not None
        return *whole, sink_gradient(grad, out, lse, sinks[0]) if sinks else None, None, None, None
