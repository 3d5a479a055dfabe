"""Attention by one of the kernels of ops/attention_kernels.py. The gradient of a long row is computed a few heads at a time.

flash-attn's backward kernel, which torch's flash op also uses, sums dQ in float32. Where query heads share keys, it makes dK and dV for
every query head and then adds them up (mha_varlen_bwd: dq_accum, dk_expanded, dv_expanded). For 32 heads that share 8 key heads, each of
128 features, that is 32 kB per token, more than anything else in a layer. Heads do not depend on one another. So one call takes as many
key heads as keep these sums within AT_ONCE bytes. With so many tokens a single head fills the device.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops.kernel import Call, Kernel
from swift_mega.ops.sinks import add_sinks, sink_gradient

AT_ONCE = 2 << 30
"""Bytes of the backward kernel's own sums."""


def key_heads_at_once(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Key heads whose gradient one call computes. queries, keys: tokens. itemsize: bytes of a number."""
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
    kernel: Kernel, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor, Tensor]]]:
    """(query heads, key heads, gradients of query, key and value for these heads) of each call. Shapes as in `Kernel`."""
    for mine, theirs in _parts(query, key):
        found = kernel.backward(
            grad[:, mine],
            query[:, mine],
            key[:, theirs],
            value[:, theirs],
            out[:, mine],
            lse[mine],
            call.of_heads(mine),
        )
        yield mine, theirs, found


def padded(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value with as many features as the kernel wants: a multiple of 8, and the same number in keys and values unless the
    kernel has `value_dim`.

    Zeros change no score. The caller removes what they add to the output.
    """
    size, value_size = (x.shape[-1] + -x.shape[-1] % 8 for x in (query, value))
    if not kernel.value_dim:
        size = value_size = max(size, value_size)
    wanted = (size, size, value_size)
    query, key, value = (_padded(x, size) for x, size in zip((query, key, value), wanted, strict=True))
    return query, key, value


def _padded(x: Tensor, size: int) -> Tensor:
    x = x if size == x.shape[-1] else F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def flash(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: Call) -> Tensor:
    """Attention within the examples of a row; shapes as in `ops.attention.attention`."""
    value_dim = value.shape[-1]
    out = _Flash.apply(*padded(kernel, query, key, value), sinks, call, kernel)
    return out if out.shape[-1] == value_dim else out[..., :value_dim]  # type: ignore[no-any-return]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: Call, kernel: Kernel
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value, call)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.call, ctx.kernel = call, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        grad = gradients[0].contiguous()
        whole: list[Tensor] | None = None
        for mine, theirs, found in backward_by_heads(ctx.kernel, grad, query, key, value, out, lse, ctx.call):
            if theirs == slice(0, key.shape[1]):
                whole = list(found)
                break
            if whole is None:
                whole = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
            for target, heads, part in zip(whole, (mine, theirs, theirs), found, strict=True):
                target[:, heads] = part
        assert whole is not None
        return *whole, sink_gradient(grad, out, lse, sinks[0]) if sinks else None, None, None
