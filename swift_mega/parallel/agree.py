"""An error on one rank is raised by all ranks, after all of them have learned of it.

A rank that raised alone would leave its peers in the next collective: they wait, or fail with a broken connection in place of the
reason. So code between two collectives keeps its problem as text, still takes part in the collectives, and then calls `agree`.

These messages go through the host, in a gloo group of their own. One rank may come hours after the others (rank 0 merges an adapter, a
reader waits for a slow disk), and a collective of NCCL would then be aborted after its timeout.
"""

import errno
import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from swift_mega.errors import AgreedError, UserError
from swift_mega.outputs import FULL, cannot_write

Result = TypeVar("Result")


LONGEST_WAIT = timedelta(days=2)
"""How long a rank waits for the others on the host. If one of them dies, the wait ends at once, because its connections close."""


def gather(mine: Result) -> list[Result]:
    """`mine` of every rank, in the order of ranks. It is pickled, and stays on the host. Collective."""
    if dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=_host_group(dist.group.WORLD))
    return everyone


@functools.lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of all ranks of `world`. Collective when it is made, at the first call."""
    try:
        return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    except RuntimeError as error:
        raise UserError(
            f"ranks cannot connect over gloo, which they need to exchange errors ({str(error).splitlines()[0]}); set "
            "GLOO_SOCKET_IFNAME on every machine to the network interface that reaches the others (`ip addr` lists them)"
        ) from None


def agree(problem: str | None) -> None:
    """Every rank raises the error of the first rank that has a problem, so that none waits for another. Collective."""
    said = next((text for text in gather(problem) if text is not None), None)
    if said is not None:
        raise AgreedError(said)


def on_first_rank(action: Callable[[], object], target: Path | None = None) -> str | None:
    """Rank 0 acts; returns what went wrong there, else None. target: the path that it writes; the message for an OSError names it."""
    return attempt(action, target)[1] if dist.get_rank() == 0 else None


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Every rank acts; if one fails, all raise its error. The action must not contain a collective. Collective."""
    result, problem = attempt(action)
    agree(problem)
    return cast(Result, result)


def attempt(action: Callable[[], Result], target: Path | None = None) -> tuple[Result | None, str | None]:
    """(the action's result, None), or (None, the problem) for a UserError or an OSError. Any other exception is a defect, and is raised."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, cannot_write(target, error) if target is not None else _said(error)


def _said(error: OSError) -> str:
    remedy = "free the space" if error.errno in FULL else "correct it, and start again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give this user permission for it, or name another path"
    return f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}"
