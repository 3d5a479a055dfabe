"""ALiBi (Press et al. 2021, arXiv:2108.12409): a score gains `slope` for each position of its key, by head.

The softmax of a query does not change with what all its scores gain, so the bias may be counted from the query or from the first
key. Counted from the first key it is a product: one more feature, the position in every key, the slope in every query. So
attention without a bias computes it, gradients included.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head: 2^-(8/n), 2^-(16/n), … for n heads; between powers of two, every other one of 2n fills up."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return tuple(first + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)])


def with_positions(
    query: Tensor, key: Tensor, alibi: Tensor, *, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """query [tokens, heads, head_dim] and key [tokens, kv_heads, head_dim], each with the one more feature.

    alibi: [heads] slopes; bounds: where examples begin, and the end of the last; scale: of the scores that follow.
    """
    positions = torch.cat(
        [torch.arange(end - start, device=key.device) for start, end in zip(bounds, bounds[1:], strict=False)]
    )
    more = (alibi.to(query.dtype) / scale).expand(len(query), -1).unsqueeze(-1)
    counted = positions.to(key.dtype)[:, None, None].expand(-1, key.shape[1], -1)
    return torch.cat((query, more), dim=-1), torch.cat((key, counted), dim=-1)


def bias(alibi: Tensor, tokens: int) -> Tensor:
    """[heads, tokens, tokens]: what the score of a query and a key before it gains, counted from the query."""
    places = torch.arange(tokens, device=alibi.device)
    return alibi[:, None, None] * (places[None] - places[:, None])
