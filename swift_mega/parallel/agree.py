"""Nobody raises alone: what goes wrong on one rank is kept until all ranks ask one another, and then all raise it.

A rank that raised on its own would leave its peers in the next collective: they wait, or fail with a broken connection in place
of the reason. So code between two collectives keeps its problem as text, goes on taking part, and calls `agree`.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from swift_mega.errors import AgreedError, UserError
from swift_mega.outputs import FULL, cannot_write

Result = TypeVar("Result")


def agree(problem: str | None) -> None:
    """Every rank raises the error of the first rank that has a problem; none is left waiting. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    said = next((text for text in problems if text is not None), None)
    if said is not None:
        raise AgreedError(said)


def on_first_rank(action: Callable[[], object], target: Path | None = None) -> str | None:
    """Rank 0 acts; returns what went wrong there. target: what it writes, where an OSError is to be told of that."""
    return attempt(action, target)[1] if dist.get_rank() == 0 else None


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Each rank acts, without a collective in it; where one fails, all raise its error. Collective."""
    result, problem = attempt(action)
    agree(problem)
    return cast(Result, result)


def attempt(action: Callable[[], Result], target: Path | None = None) -> tuple[Result | None, str | None]:
    """What the action returned, or what went wrong; anything but a UserError or an OSError is a defect, and raised."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, cannot_write(target, error) if target is not None else _said(error)


def _said(error: OSError) -> str:
    remedy = "free the space" if error.errno in FULL else "mend that, and start again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give this user the right to it, or name another path"
    return f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}"
