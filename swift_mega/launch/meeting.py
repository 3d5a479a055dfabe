"""Where ranks of several processes meet: the store behind MASTER_ADDR and MASTER_PORT, and what to say where they cannot.

torch's client of a store waits for ever for a program that listens on the port and is no store. So every step has its own limit here,
and its own error.
"""

import errno
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from swift_mega.errors import UserError

MEETING_SECONDS = 600.0
"""How long ranks wait for one another: a cluster starts its machines minutes apart."""
ANSWER_SECONDS = 20.0
"""How long a store that listens may take to answer."""
AGAIN_SECONDS, SPEAKS_FIRST_SECONDS = 0.2, 0.1


def open_store(host: str, port: int, world: int, *, serve: bool, waiting: float = MEETING_SECONDS) -> Any:
    """The store of `world` ranks, which rank 0 serves. UserError where the port is taken, nobody answers, or ranks are missing."""
    return _serve(host, port, world, waiting) if serve else _join(host, port, world, waiting)


def _serve(host: str, port: int, world: int, waiting: float) -> Any:
    import torch.distributed as dist

    if _is_taken(port):  # torch finds it too, with a page of C++ frames
        raise UserError(_taken(host, port))
    begin = time.monotonic()
    try:
        return dist.TCPStore(host, port, world, is_master=True, timeout=timedelta(seconds=waiting))
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if time.monotonic() - begin >= waiting:
            raise UserError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: not all of {world} ranks came within {waiting:.0f} s ({reason}); look at "
                "what the other processes say, and whether they have the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE or NNODES"
            ) from None
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: the first rank cannot listen there ({reason}); MASTER_ADDR is the address of "
            "its machine, and the port one that this user may open"
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

    # A thread that waits for ever in C++ ends with its process, and holds nothing.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not found or isinstance(found[0], dist.DistError):
        raise UserError(_taken(host, port))
    found[0].set_timeout(timedelta(seconds=waiting))
    return found[0]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as torch does: an earlier run's closed connections do not count
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _await_listener(host: str, port: int, waiting: float) -> None:
    """Returns once something listens; UserError after `waiting` seconds."""
    until = time.monotonic() + waiting
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as probe:
                probe.settimeout(SPEAKS_FIRST_SECONDS)
                try:
                    probe.recv(1)
                except TimeoutError:
                    return
            raise UserError(_taken(host, port))  # it closed the connection, or spoke first: a store does neither
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR={host} MASTER_PORT={port}: nobody answers there for {waiting:.0f} s ({error.strerror or error}); "
                    "both must be those of the first rank's machine, reachable from here, and its process must be running"
                ) from None
            time.sleep(AGAIN_SECONDS)


def _taken(host: str, port: int) -> str:
    return (
        f"MASTER_PORT={port} on {host} is in use by another program or another run; end that one, or give every process of this run "
        "the same other port, for example MASTER_PORT=" + str(port + 1 if port < 65535 else 29500)
    )
