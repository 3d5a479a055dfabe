"""Attention sinks (gpt-oss; Xiao et al. 2023, arXiv:2309.17453): a learned logit of each head that joins the softmax and has no value.

With l the log-sum-exp of a row's scores, a sink s leaves exp(l) / (exp(l) + exp(s)) of the output, and makes the log-sum-exp
log(exp(l) + exp(s)). So the result of any kernel that gives its log-sum-exp is corrected afterwards; and the gradient of queries, keys
and values is what the kernel's own backward pass makes of the corrected output and log-sum-exp, which is all that it knows of the
softmax: weights exp(score - lse), and the mean of their gradient, output times gradient.
"""

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
