"""SIGTERM and SIGHUP as an exception: what has to be undone (ranks, their folder, an output half written) is undone by the same
`finally` that an error would run, and the process leaves with the status that a shell gives such an end, 128 + the signal's number.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Sent by a scheduler, a container, torchrun, or a terminal that closes."""


class Ended(SystemExit):
    """This process was asked to end. A SystemExit, so that a script that knows nothing of it ends quietly and with that status."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, the first SIGTERM or SIGHUP raises Ended in the main thread; later ones are ignored, so that they do not disturb the end.

    A signal that is ignored (nohup) or that the caller handles stays so, and in another thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _: object) -> NoReturn:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def leave_by(ended: Ended) -> NoReturn:
    """End this process by the signal itself: whoever waits for it sees what it was."""
    signal.signal(ended.signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {ended.signal})
    signal.raise_signal(ended.signal)
    raise ended  # not reached where the signal's default is to end the process
