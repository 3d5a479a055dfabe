"""SIGTERM and SIGHUP as an exception.

So the same `finally` blocks clean up (ranks, their folder, a partly written output) as after an error. The exit status is
128 + the signal's number, as in a shell.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Sent by a scheduler, a container, torchrun, or a terminal that closes."""


class Ended(SystemExit):
    """A signal asked this process to end. It is a SystemExit, so a script that does not catch it ends without a traceback."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """In this context, the first SIGTERM or SIGHUP raises Ended in the main thread; later ones are ignored, so cleanup is not interrupted.

    A signal that is ignored (nohup), or that the caller handles, is not changed. Outside the main thread nothing is changed.
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
    """Ends this process by the signal itself, so its parent sees the signal."""
    signal.signal(ended.signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {ended.signal})
    signal.raise_signal(ended.signal)
    # Only reached where the default action of the signal does not end the process.
    raise ended
