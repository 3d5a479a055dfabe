"""Waits for ranks: all succeed, or the first failure ends all of them and is raised.

The peers of a failed rank fail too, some milliseconds later, with errors about a closed connection. `_cause` chooses the error that
explains the failure: a UserError, a death by a signal, a rank that ended without a report, or the earliest exception.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from swift_mega.errors import UserError
from swift_mega.launch.ended import Ended
from swift_mega.launch.rank import RankSpec, Report, log_path, read_report

POLL_SECONDS = 0.01
# A killed process closes its sockets a moment before waitid sees its end.
GRACE_SECONDS = 0.05
# Time for ranks to end by themselves after a signal; a scheduler sends SIGKILL after about 30 seconds.
ASKED_SECONDS = 5.0
SHOWN_LINES = 60


class RankError(RuntimeError):
    """A rank failed, and not by a UserError. The message has its traceback, or the signal that killed it."""


@dataclass(frozen=True)
class Exit:
    """How a rank's process ended: an exit status, or the signal that killed it."""

    status: int
    signal: int | None = None


def wait(specs: dict[int, RankSpec], folder: Path, logs: Path) -> None:
    """Waits for ranks. specs: process id -> spec, for ranks that this process started; each is the leader of its process group.

    Returns when all ranks have succeeded. Otherwise ends the other ranks and raises the rank's UserError, or RankError. After it returns
    or raises (also KeyboardInterrupt), no rank and no child of a rank is running.
    """
    ended: dict[int, Exit] = {}
    try:
        while len(ended) < len(specs):
            _poll(specs, ended)
            if any(_failed(specs[pid], end, folder) for pid, end in ended.items()):
                time.sleep(GRACE_SECONDS)
                _poll(specs, ended)
                raise _cause({specs[pid]: end for pid, end in ended.items()}, folder, logs)
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        end_all(specs, by=error)
        raise
    end_all(specs)


def end_all(pids: dict[int, RankSpec], *, by: BaseException | None = None) -> None:
    """Kills the process group of each rank and reaps the rank. Ranks that have ended are still zombies, so no process id was reused.

    by: the exception that ends them. If it is a signal (Ended), the signal is passed on first, so that a rank can remove a partly written
    output.
    """
    try:
        if isinstance(by, Ended):
            _ask(pids, by.signal)
    # `finally`, so that Ctrl-C does not stop this.
    finally:
        for pid in pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            # The process has started, but is not yet the leader of its group.
            except ProcessLookupError:
                os.kill(pid, signal.SIGKILL)
            # macOS raises this for a group of zombies.
            except PermissionError:
                pass
        for pid in pids:
            os.waitpid(pid, 0)


def _ask(pids: dict[int, RankSpec], number: signal.Signals) -> None:
    """Passes a signal to the ranks and gives them ASKED_SECONDS. A rank inside a collective reacts when the connection of a peer closes."""
    for pid in pids:
        os.kill(pid, number)
    ended: dict[int, Exit] = {}
    until = time.monotonic() + ASKED_SECONDS
    while len(ended) < len(pids) and time.monotonic() < until:
        _poll(pids, ended)
        time.sleep(POLL_SECONDS)


def _poll(specs: dict[int, RankSpec], ended: dict[int, Exit]) -> None:
    for pid in specs.keys() - ended.keys():
        seen = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if seen is None:
            continue
        by_signal = seen.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        ended[pid] = Exit(1, seen.si_status) if by_signal else Exit(seen.si_status)


def _failed(spec: RankSpec, end: Exit, folder: Path) -> bool:
    report = read_report(folder, spec.local_rank)
    return end.signal is not None or end.status != 0 or report is None or report.kind != "done"


def _cause(ended: dict[RankSpec, Exit], folder: Path, logs: Path) -> Exception:
    """The error to raise. ended: the ranks that have ended so far; at least one of them failed."""
    reports = {spec: report for spec in ended if (report := read_report(folder, spec.local_rank))}
    failures = sorted(((r.when, s.rank, s, r) for s, r in reports.items() if r.kind != "done"), key=lambda f: f[:2])
    for _, _, _, report in failures:
        if report.kind == "user":
            return UserError(report.text)
    killed = [(spec, end.signal) for spec, end in ended.items() if end.signal is not None]
    # A C++ library may end by SIGABRT when a connection to a peer closes. Where another rank has an exception, SIGABRT is not the cause.
    for spec, number in sorted(killed, key=lambda k: (k[1] == signal.SIGABRT, k[0].rank)):
        if number != signal.SIGABRT or not failures:
            return RankError(_killed(spec, number, logs))
    silent = [spec for spec, end in ended.items() if end.signal is None and spec not in reports]
    for spec in sorted(silent, key=lambda s: s.rank):
        status = ended[spec].status
        return RankError(f"rank {spec.rank} ended with status {status} before its work was complete{_tail(spec, logs)}")
    assert failures, "a rank that reported success has failed"
    return RankError(_traceback(failures[0][2], failures[0][3]))


def _traceback(spec: RankSpec, report: Report) -> str:
    return f"rank {spec.rank} of {spec.world} failed:\n{report.text}"


def _killed(spec: RankSpec, number: int, logs: Path) -> str:
    name = signal.Signals(number).name
    reason = ""
    if number == signal.SIGKILL:
        reason = (
            "; most often the kernel does this when memory runs out: use fewer ranks on this machine, a smaller "
            "train.micro_batch_size or data.max_length, or train.recompute=full"
        )
    return f"rank {spec.rank} of {spec.world} was killed by signal {number} ({name}){reason}{_tail(spec, logs)}"


def _tail(spec: RankSpec, logs: Path) -> str:
    path = log_path(logs, spec.rank)
    lines = path.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if path.exists() else []
    return "\nits last output:\n" + "\n".join(lines) if lines else ""
