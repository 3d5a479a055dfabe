"""ALiBi (Press et al. 2021, arXiv:2108.12409): a score gains `slope` for each position of its key, by head.

The softmax of a query does not change with what all its scores gain, so the bias may be counted from the query or from the first
key of the example. Counted from the first key it is a product of features: the position in every key, the slope in every query. So
attention without a bias computes it, gradients included.

float32 and float64 take one feature. bfloat16 has 8 binary digits, so a position p becomes 256 a + b with a and b below 256, and
slope / scale becomes a sum of PARTS numbers s1 + s2 + s3 of the dtype, each what the ones before leave:

    query: 256 s1, 256 s2, 256 s3, s1, s2, s3, 0, 0        key: a, a, a, b, b, b, 0, 0

Products and sums are float32 in every kernel, so what is lost is float32's rounding of slope * p, not bfloat16's. That rounding grows
with p: up to LONGEST tokens it is below what rounding the weights to the dtype costs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

PARTS = 3
"""Numbers that a slope is split into: 24 binary digits in bfloat16."""
FEATURES = 8
"""More features of a head in bfloat16 and float16; kernels want a multiple of 8."""
LONGEST = {torch.bfloat16: 32768, torch.float16: 8192}
"""Tokens of the longest example whose positions go into features: there the steepest head loses about as much as by the dtype itself."""


def slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head: 2^-(8/n), 2^-(16/n), … for n heads; between powers of two, every other one of 2n fills up."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return tuple(first + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)])


def with_positions(
    query: Tensor, key: Tensor, alibi: Tensor, *, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """query [tokens, heads, head_dim] and key [tokens, kv_heads, head_dim], each with the further features.

    alibi: [heads] slopes; bounds: where examples begin, and the end of the last; scale: of the scores that follow.
    """
    positions = torch.cat([torch.arange(end - start, device=key.device) for start, end in pairwise(bounds)])
    if query.dtype in (torch.float32, torch.float64):
        of_query, of_key = [alibi.to(query.dtype) / scale], [positions]
    else:
        parts = _split(alibi.double() / scale, query.dtype)
        of_query = [256 * part for part in parts] + parts
        of_key = [positions // 256] * PARTS + [positions % 256] * PARTS
        of_query += [torch.zeros_like(parts[0])] * (FEATURES - len(of_query))
        of_key += [torch.zeros_like(positions)] * (FEATURES - len(of_key))
    more = torch.stack(of_query, -1).to(query.dtype).expand(len(query), -1, -1)
    counted = torch.stack(of_key, -1).to(key.dtype)[:, None].expand(-1, key.shape[1], -1)
    return torch.cat((query, more), dim=-1), torch.cat((key, counted), dim=-1)


def _split(wide: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """PARTS tensors of numbers that the dtype holds, in float64, whose sum is `wide` but for what the last can't hold."""
    parts = []
    for _ in range(PARTS):
        parts.append(wide.to(dtype).double())
        wide = wide - parts[-1]
    return parts
