"""Attention sinks (gpt-oss; Xiao et al. 2023, arXiv:2309.17453): each head has a learned logit in the softmax that has no value.

Let l be the log-sum-exp of a query's scores. A sink s multiplies the output by exp(l) / (exp(l) + exp(s)), and changes the log-sum-exp
to log(exp(l) + exp(s)). So the result of any kernel that returns its log-sum-exp is corrected afterwards. The gradients of queries, keys
and values come from the kernel's own backward pass, given the corrected output and log-sum-exp. This is exact, because the backward pass
uses the softmax only through its weights exp(score - lse) and the mean of their gradient, output times gradient.
"""

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out [tokens, heads, head_dim], lse [heads, tokens] and sinks [heads] -> out and lse of the softmax with the sinks."""
    wide = sinks.to(lse.dtype)[:, None]
    kept = torch.sigmoid(lse - wide).t()[..., None]
    return (out * kept).to(out.dtype), torch.logaddexp(lse, wide)


def sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[heads]: the gradient of the sinks, from the corrected out and lse. A sink has no value, so only the mean is left."""
    mean = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
    return -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * mean).sum(-1).to(sinks.dtype)
