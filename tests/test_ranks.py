"""The `ranks` fixture: rank 0's result is returned, a rank's error fails the test, and no rank waits for ever."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def _sum_of_ranks(extra: int) -> dict[str, float]:
    total = torch.tensor([float(dist.get_rank() + extra)])
    dist.all_reduce(total)
    return {"total": total.item(), "rank": dist.get_rank(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rank_0_result_comes_back(ranks, size):
    got = ranks(size, _sum_of_ranks, 1)
    assert got["total"] == sum(range(1, size + 1)) and got["rank"] == 0
    assert size == 1 or got["threads"] == 1


def _fails_on_the_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ArithmeticError("this one")
    dist.barrier()


def test_a_ranks_traceback_is_shown(ranks):
    """The traceback is that of the cause, not of the peers' broken connections."""
    with pytest.raises(
        Exception, match=r"rank 1 of 2 failed:\n(.|\n)*_fails_on_the_last\n(.|\n)*ArithmeticError: this one"
    ):
        ranks(2, _fails_on_the_last)


def _hangs() -> None:
    time.sleep(600)


def _children() -> set[str]:
    """Processes that this process started and that are not reaped; libraries of other tests may have started some."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_timeout_ends_every_rank(ranks):
    start, before = time.monotonic(), _children()
    with pytest.raises(TimeoutError, match="more than 1 s"):
        ranks(2, _hangs, timeout=1)
    assert time.monotonic() - start < 10
    assert _children() <= before
