"""Decodes two 4-bit codes per byte in one lookup: a table of 256 pairs of float32, each pair stored as one 8-byte float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pairs(values: Sequence[float] | Tensor, *, low_first: bool) -> Tensor:
    """The table: [256] float64, whose bytes are the two float32 numbers of each byte value. values: [16], the number of each code."""
    table = torch.as_tensor(values, dtype=torch.float32)
    codes = torch.arange(256)
    low, high = table[codes & 15], table[codes >> 4]
    return torch.stack((low, high) if low_first else (high, low), dim=1).view(torch.float64).view(-1)


def look_up(table: Tensor, stored: Tensor) -> Tensor:
    """Decodes bytes [...] by a table of `pairs`: [2 * bytes] float32."""
    return table.index_select(0, stored.reshape(-1).int()).view(torch.float32)
