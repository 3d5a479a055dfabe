"""Attention by its definition in float64: the reference for kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention_in_float64(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[tokens, heads, value_dim]; arguments as in ops.attention.attention. One softmax [heads, n, n] per example."""
    outs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = (x[start:end].double().transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(end - start, device=query.device)
        distance = places[:, None] - places
        if alibi is not None:
            scores = scores - alibi.double()[:, None, None] * distance
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, end - start, 1)), -1)
        outs.append((scores.softmax(-1)[..., : end - start] @ v).transpose(0, 1))
    return torch.cat(outs)
