"""The rendezvous of ranks in several processes: the store at MASTER_ADDR and MASTER_PORT, and the errors where it fails.

If another program listens on the port, torch's client of the store waits forever. So each step here has its own time limit and error.
"""

import errno
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from swift_mega.errors import UserError

MEETING_SECONDS = 600.0
"""Seconds that ranks wait for one another: machines of a cluster may start minutes apart."""
ANSWER_SECONDS = 20.0
"""Seconds that a store may take to answer after it accepts a connection."""
AGAIN_SECONDS, SPEAKS_FIRST_SECONDS = 0.2, 0.1


def open_store(host: str, port: int, world: int, *, serve: bool, waiting: float = MEETING_SECONDS) -> Any:
    """The store of `world` ranks; rank 0 serves it. UserError where the port is in use, nothing answers, or ranks are missing."""
    return _serve(host, port, world, waiting) if serve else _join(host, port, world, waiting)


def _serve(host: str, port: int, world: int, waiting: float) -> Any:
    import torch.distributed as dist

    # torch finds this too, but its error is a page of C++ frames.
    if _is_taken(port):
        raise UserError(_taken(host, port))
    begin = time.monotonic()
    try:
        return dist.TCPStore(host, port, world, is_master=True, timeout=timedelta(seconds=waiting))
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if time.monotonic() - begin >= waiting:
            raise UserError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: not all of {world} ranks connected within {waiting:.0f} s ({reason}); see "
                "the output of the other processes, and whether they have the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE or NNODES"
            ) from None
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: the first rank cannot listen there ({reason}); MASTER_ADDR is the address of "
            "its machine, and the port must be one that this user may open"
        ) from None


def _join(host: str, port: int, world: int, waiting: float) -> Any:
    import torch.distributed as dist

    _await_listener(host, port, waiting)
    found: list[Any] = []

    def join() -> None:
        try:
            found.append(
                dist.TCPStore(host, port, world, is_master=False, timeout=timedelta(seconds=0.75 * ANSWER_SECONDS))
            )
        except dist.DistError as error:
            found.append(error)

    # The thread may wait in C++ forever. It is a daemon, so it ends with the process, and it holds no resource.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not found or isinstance(found[0], dist.DistError):
        raise UserError(_taken(host, port))
    found[0].set_timeout(timedelta(seconds=waiting))
    return found[0]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        # As torch does: closed connections of an earlier run do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _await_listener(host: str, port: int, waiting: float) -> None:
    """Waits until a store listens; UserError after `waiting` seconds, or where another program uses the port."""
    until = time.monotonic() + waiting
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as probe:
                probe.settimeout(SPEAKS_FIRST_SECONDS)
                try:
                    probe.recv(1)
                except TimeoutError:
                    return
            # The program closed the connection or sent data first; a store does neither.
            raise UserError(_taken(host, port))
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR={host} MASTER_PORT={port}: no answer for {waiting:.0f} s ({error.strerror or error}); "
                    "both must be those of the first rank's machine, reachable from here, and its process must be running"
                ) from None
            time.sleep(AGAIN_SECONDS)


def _taken(host: str, port: int) -> str:
    return (
        f"MASTER_PORT={port} on {host} is in use by another program or another run; end that one, or give every process of this run "
        "the same other port, for example MASTER_PORT=" + str(port + 1 if port < 65535 else 29500)
    )
