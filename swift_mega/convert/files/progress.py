"""A progress bar with bytes per second and remaining time, on standard error of the first rank, for work that takes over 2 seconds."""

import sys

import torch.distributed as dist
from tqdm import tqdm


def bytes_bar(total: int, what: str) -> "tqdm[None]":
    """A bar over this rank's `total` bytes; `.update(bytes)` advances it. Where stderr is no terminal, it prints every ten seconds."""
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
