"""One rank's process: its environment, its process group, its body, and the report it leaves.

A rank says how it ended in a file, written whole before its sockets close. So when one rank fails and its peers then
fail because it went away, the cause is on disk before any consequence can be, and `watch` shows the cause.
"""

import ctypes
import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

from swift_mega.errors import UserError
from swift_mega.launch.ended import Ended, leave_by, signals_raise
from swift_mega.launch.meeting import open_store

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one rank sits. `rendezvous` is a file (one machine) or tcp://host:port (several)."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    kind: DeviceKind
    threads: int
    rendezvous: str
    timeout_minutes: int
    """How long a collective may take, before it ends the run."""

    def environment(self) -> dict[str, str]:
        """What torchrun would have set, and threads for libraries that read them when they are loaded."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "OMP_NUM_THREADS": str(self.threads),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank ended: its body's result, a user's error, or a traceback. when: the monotonic clock, in seconds."""

    kind: Literal["done", "user", "defect"]
    when: float
    text: str = ""
    result: bytes = b""


def report_path(folder: Path, local_rank: int) -> Path:
    return folder / f"report{local_rank}"


def log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def loopback() -> str | None:
    """The loopback interface: with it, ranks of one machine need neither a network nor a host name that resolves."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


@contextmanager
def process_group(seat: Seat) -> Iterator[None]:
    """torch.distributed's default group for this rank; destroyed if the body succeeds (a failed NCCL group may hang)."""
    import torch.distributed as dist

    if seat.kind == "cuda":
        from swift_mega.device import device as devices

        devices.setup()  # makes this rank's device the current one, before NCCL asks for it
    backend = "nccl" if seat.kind == "cuda" else "gloo"
    timeout = timedelta(minutes=seat.timeout_minutes)
    dist.init_process_group(
        backend, store=_store(seat, timeout), rank=seat.rank, world_size=seat.world, timeout=timeout
    )
    if seat.kind == "cuda" and seat.world > 1:
        _check_own_device()
    if backend == "gloo" and seat.world > 1:
        # A rank whose body ends at once would close connections that its peers are still making ("connectFullMesh failed").
        dist.barrier()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(seat: Seat, timeout: timedelta) -> Any:
    """Where ranks find each other. None: torchrun's environment says, since it may serve the store itself."""
    import torch.distributed as dist

    if seat.rendezvous == "env://":
        return None
    if seat.world == 1:
        return dist.HashStore()
    if seat.rendezvous.startswith("tcp://"):
        host, _, port = seat.rendezvous.removeprefix("tcp://").rpartition(":")
        store = open_store(host, int(port), seat.world, serve=seat.rank == 0)
    else:
        store = dist.FileStore(seat.rendezvous, seat.world)
    # NCCL makes its communicators at their first use, through the store: whoever comes first there waits for the others.
    store.set_timeout(timeout)
    return store


def _check_own_device() -> None:
    """UserError on all ranks where two of them have the same GPU. Collective."""
    import torch

    from swift_mega.parallel.agree import gather

    refuse_shared_devices(gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)))


def refuse_shared_devices(devices: list[str]) -> None:
    """UserError where two ranks have one GPU, which NCCL refuses only at the first collective. devices: of each rank, unique names."""
    for number, device in enumerate(devices):
        if (first := devices.index(device)) != number:
            raise UserError(
                f"ranks {first} and {number} have the same GPU ({device}), and NCCL refuses two ranks on one: start as many ranks on a "
                "machine as it has GPUs, and set LOCAL_RANK in each, as torchrun and srun do"
            )


def run_seat(seat: Seat, folder: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    """Be this rank until the body ends, write the report, leave the process. Never returns, so a fork never runs on
    in its parent's code (a test runner, a notebook)."""
    import torch

    status = 1
    # BaseException: this is the edge of a process. Whatever ended the body has to reach the parent, which raises it.
    try:
        torch.set_num_threads(seat.threads)
        with signals_raise(), process_group(seat):
            result = body(*args)
            packed = pickle.dumps(result) if seat.local_rank == 0 else b""
            _write(report_path(folder, seat.local_rank), Report(kind="done", when=time.monotonic(), result=packed))
        status = 0
    except Ended as ended:
        leave_by(ended)
    except UserError as error:
        _write(report_path(folder, seat.local_rank), Report(kind="user", when=time.monotonic(), text=str(error)))
    except BaseException:
        text = traceback.format_exc()
        _write(report_path(folder, seat.local_rank), Report(kind="defect", when=time.monotonic(), text=text))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def settle(parent: int) -> None:
    """Tie this process to its parent: a group of its own, and SIGKILL from the kernel when the parent dies.

    The group keeps Ctrl-C with the parent, which ends every rank itself, and lets it end a rank's own children too.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(1)


def redirect_output(path: Path) -> None:
    """Both output streams of this process into `path`, and no standard input: what ranks other than the first have."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    # not only the descriptors: a test runner or a notebook puts its own objects in sys
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()  # a crash in C++ leaves its Python stack in the log, which the parent shows


def read_report(folder: Path, local_rank: int) -> Report | None:
    path = report_path(folder, local_rank)
    if not path.exists():
        return None
    report = pickle.loads(path.read_bytes())
    assert isinstance(report, Report)
    return report


def _write(path: Path, report: Report) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_bytes(pickle.dumps(report))
    scratch.rename(path)
