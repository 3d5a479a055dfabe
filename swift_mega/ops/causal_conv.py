"""A short causal convolution of each channel, over the examples of a packed row.

`taps - 1` zeros are inserted before each example. So one call serves the whole row, and no token sees another example.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops.gated_delta import places
from swift_mega.ops.kernels import AUTO, Form, Kernels, Op


def causal_conv(x: Tensor, weight: Tensor, *, cu_seqlens: Tensor, kernels: Kernels = AUTO) -> Tensor:
    """x [tokens, channels], weight [channels, 1, taps] (the last tap belongs to the token itself) -> [tokens, channels].

    cu_seqlens: [examples + 1] int32, the first token of each example and the end of the last.
    """
    run = kernels.form(CAUSAL_CONV, x.device, x.dtype).run
    return run(x, weight, cu_seqlens=cu_seqlens)  # type: ignore[no-any-return]


def causal_conv_reference(x: Tensor, weight: Tensor, *, cu_seqlens: Tensor) -> Tensor:
    """`causal_conv` by torch's convolution."""
    before = weight.shape[-1] - 1
    examples = len(cu_seqlens) - 1
    counts = cu_seqlens.long().diff() + before
    place = places(cu_seqlens, counts, len(x)) + before
    spread = x.new_zeros(len(x) + before * examples, x.shape[1]).index_copy(0, place, x)
    out = F.conv1d(spread.t()[None], weight, groups=x.shape[1])[0]
    return torch.index_select(out, 1, place - before).t()


CAUSAL_CONV = Op("causal_conv", (Form("reference", "torch's", causal_conv_reference),))
