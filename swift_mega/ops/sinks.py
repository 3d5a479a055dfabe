"""Attention sinks (gpt-oss; Xiao et al. 2023, arXiv:2309.17453): a learned logit of each head that joins the softmax and has no value.

With l the log-sum-exp of a row's scores, a sink s leaves exp(l) / (exp(l) + exp(s)) of the output, and makes the log-sum-exp
log(exp(l) + exp(s)). So the result of any kernel that gives its log-sum-exp is corrected afterwards; and the gradient of queries, keys
and values is what the kernel's own backward pass makes of the corrected output and log-sum-exp, which is all that it knows of the
softmax: weights exp(score - lse), and the mean of their gradient, output times gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out [tokens, heads, head_dim], lse [heads, tokens] and sinks [heads] -> out and lse with the sinks in the softmax."""
    wide = sinks.to(lse.dtype)[:, None]
    kept = torch.sigmoid(lse - wide).t()[..., None]
    return (out * kept).to(out.dtype), torch.logaddexp(lse, wide)


def sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[heads]: towards the sinks, from the corrected out and lse; a sink's value is zero, so only the mean is left."""
    mean = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
    return -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * mean).sum(-1).to(sinks.dtype)


def flash_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, cu_seqlens: Tensor, longest: int, scale: float,
    window: int | None, forward: Callable[..., Any], backward: Callable[..., Any],
) -> Tensor:  # fmt: skip
    """flash-attn's kernels with sinks; shapes as in ops.attention.

    forward, backward: _flash_attn_varlen_forward and _flash_attn_varlen_backward of flash_attn.flash_attn_interface (2.7 and newer),
    which take and give the log-sum-exp [heads, tokens]; its public function has no gradient for that.
    """
    settings = dict(
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=0.0,
        softmax_scale=scale, causal=True, window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0, softcap=0.0, alibi_slopes=None,
    )  # fmt: skip
    return _FlashWithSinks.apply(query, key, value, sinks, settings, forward, backward)


class _FlashWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, settings: dict[str, Any],
        forward: Callable[..., Any], backward: Callable[..., Any],
    ) -> Tensor:  # fmt: skip
        query, key, value = (x.contiguous() for x in (query, key, value))
        out, lse, *_ = forward(query, key, value, **settings, return_softmax=False)
        out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.settings, ctx.kernel = settings, backward
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad = gradients[0].contiguous()
        towards = [torch.empty_like(x) for x in (query, key, value)]
        ctx.kernel(grad, query, key, value, out, lse, *towards, **ctx.settings, deterministic=False)
        return *towards, sink_gradient(grad, out, lse, sinks), None, None, None
