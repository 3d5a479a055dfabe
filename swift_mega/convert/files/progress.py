"""Bytes per second and the time that is left, on the first rank's standard error, where a conversion takes long enough to ask."""

import sys

import torch.distributed as dist
from tqdm import tqdm


def bytes_bar(total: int, what: str) -> "tqdm[None]":
    """A bar over this rank's `total` bytes; `.update(bytes)` moves it. In a log file, which nobody watches, a line every ten seconds."""
    silent = dist.is_initialized() and dist.get_rank() != 0
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        delay=2,
        mininterval=0.5 if watched else 10,
        disable=silent,
        leave=watched,
    )
