"""ALiBi (Press et al. 2021, arXiv:2108.12409): each head adds slope * (position of the key) to a score.

The softmax of a query does not change when all its scores gain the same number. So the bias may be counted from the query, or from the
first key of the example. Counted from the first key it is a product of two features: the position in every key, and the slope in every
query. A kernel without a bias then computes ALiBi, gradients included.

float32 and float64 need one feature. bfloat16 has 8 binary digits. So a position p is written as 256 a + b, with a and b below 256, and
slope / scale as a sum of PARTS numbers s1 + s2 + s3 of the dtype, where each is the rounded rest that the ones before leave:

    query: 256 s1, 256 s2, 256 s3, s1, s2, s3, 0, 0        key: a, a, a, b, b, b, 0, 0

Every kernel multiplies and sums in float32, so the error is float32's rounding of slope * p, not bfloat16's. It grows with p. Up to
LONGEST tokens it is smaller than the error of rounding the softmax weights to the dtype.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

PARTS = 3
"""Numbers that a slope is split into: 24 binary digits in bfloat16."""
FEATURES = 8
"""Features added to each head in bfloat16 and float16. Kernels want a multiple of 8."""
LONGEST = {torch.bfloat16: 32768, torch.float16: 8192}
"""Longest example, in tokens, whose positions become features. There the steepest head loses about as much as by the dtype itself."""


def slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head: 2^-(8/n), 2^-(16/n), … for n heads. If `heads` is no power of two: n is the power of two below it, and the
    remaining heads take every other slope of 2n heads.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return tuple(first + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)])


def with_positions(
    query: Tensor, key: Tensor, alibi: Tensor, *, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """query [tokens, heads, head_dim] and key [tokens, kv_heads, head_dim], with the ALiBi features appended to head_dim.

    alibi: [heads] slopes. bounds: first token of each example, and the end of the last. scale: factor that the kernel applies to the
    scores.
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
    """PARTS tensors of numbers that the dtype can represent, as float64. Their sum is `wide`, except for the rounding of the last one."""
    parts = []
    for _ in range(PARTS):
        parts.append(wide.to(dtype).double())
        wide = wide - parts[-1]
    return parts
