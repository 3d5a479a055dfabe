"""The process of one rank: its environment, its process group, its body, and the report that it writes.

A rank writes how it ended to a file, completely, before its sockets close. When a rank fails, its peers fail later because its
connections close. So the report of the first failure is on disk before any other, and `watch` shows this one.
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
from swift_mega.launch.rendezvous import open_store

# linux/prctl.h
PR_SET_PDEATHSIG = 1
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """Rank numbers, device kind and rendezvous of one rank.

    rendezvous: a file (one machine), tcp://host:port (several machines), or env:// (torchrun's store).
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    kind: DeviceKind
    threads: int
    rendezvous: str
    timeout_minutes: int
    """Minutes that a collective may take before the run ends with an error."""

    def environment(self) -> dict[str, str]:
        """The variables that torchrun would set, and OMP_NUM_THREADS for libraries that read it when they are loaded."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "OMP_NUM_THREADS": str(self.threads),
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a rank ended: the result of its body, a UserError, or a traceback. when: monotonic clock, seconds."""

    kind: Literal["done", "user", "defect"]
    when: float
    text: str = ""
    result: bytes = b""


def report_path(folder: Path, local_rank: int) -> Path:
    return folder / f"report{local_rank}"


def log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def loopback() -> str | None:
    """Name of the loopback interface. With it, ranks of one machine need no network and no host name that resolves."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


@contextmanager
def process_group(spec: RankSpec) -> Iterator[None]:
    """The default group of torch.distributed on this rank. It is destroyed only after success: destroying a failed NCCL group may hang."""
    import torch.distributed as dist

    if spec.kind == "cuda":
        from swift_mega.device import device as devices

        # Makes this rank's device the current one before NCCL reads it.
        devices.setup()
    backend = "nccl" if spec.kind == "cuda" else "gloo"
    timeout = timedelta(minutes=spec.timeout_minutes)
    dist.init_process_group(
        backend, store=_store(spec, timeout), rank=spec.rank, world_size=spec.world, timeout=timeout
    )
    if spec.kind == "cuda" and spec.world > 1:
        _check_own_device()
    if backend == "gloo" and spec.world > 1:
        # Without this, a rank whose body ends at once closes connections while its peers still open them ("connectFullMesh failed").
        dist.barrier()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(spec: RankSpec, timeout: timedelta) -> Any:
    """The store in which ranks find each other. None: torch reads torchrun's environment, because torchrun may serve the store itself."""
    import torch.distributed as dist

    if spec.rendezvous == "env://":
        return None
    if spec.world == 1:
        return dist.HashStore()
    if spec.rendezvous.startswith("tcp://"):
        host, _, port = spec.rendezvous.removeprefix("tcp://").rpartition(":")
        store = open_store(host, int(port), spec.world, serve=spec.rank == 0)
    else:
        store = dist.FileStore(spec.rendezvous, spec.world)
    # NCCL creates a communicator through the store at its first use; the first rank there waits for the others.
    store.set_timeout(timeout)
    return store


def _check_own_device() -> None:
    """UserError on all ranks where two of them have the same GPU. Collective."""
    import torch

    from swift_mega.parallel.agree import gather

    refuse_shared_devices(gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)))


def refuse_shared_devices(devices: list[str]) -> None:
    """UserError where two ranks have the same GPU; NCCL would fail only at the first collective. devices: unique GPU name of each rank."""
    for number, device in enumerate(devices):
        if (first := devices.index(device)) != number:
            raise UserError(
                f"ranks {first} and {number} have the same GPU ({device}), and NCCL refuses two ranks on one: start as many ranks on a "
                "machine as it has GPUs, and set LOCAL_RANK in each, as torchrun and srun do"
            )


def run_rank(spec: RankSpec, folder: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    """Runs the body as this rank, writes the report and ends the process.

    It never returns, so a forked process never continues in the code of its parent (a test runner, a notebook).
    """
    import torch

    status = 1
    # BaseException, because the process ends here: every error of the body has to reach the parent, which raises it.
    try:
        torch.set_num_threads(spec.threads)
        with signals_raise(), process_group(spec):
            result = body(*args)
            packed = pickle.dumps(result) if spec.local_rank == 0 else b""
            _write(report_path(folder, spec.local_rank), Report(kind="done", when=time.monotonic(), result=packed))
        status = 0
    except Ended as ended:
        leave_by(ended)
    except UserError as error:
        _write(report_path(folder, spec.local_rank), Report(kind="user", when=time.monotonic(), text=str(error)))
    except BaseException:
        text = traceback.format_exc()
        _write(report_path(folder, spec.local_rank), Report(kind="defect", when=time.monotonic(), text=text))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def settle(parent: int) -> None:
    """Makes this process a process group of its own, and lets the kernel send it SIGKILL when its parent dies (on Linux).

    Because of the group, Ctrl-C goes to the parent only, which ends all ranks; it can also end the children of a rank.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent died before prctl took effect.
    if os.getppid() != parent:
        os._exit(1)


def redirect_output(path: Path) -> None:
    """Redirects stdout and stderr of this process to `path`, and stdin to /dev/null; for all ranks of a machine except its first."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    # The descriptors alone are not enough: a test runner or a notebook replaces sys.stdout and sys.stderr.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # After a crash in C++, the log has the Python stack, and the parent shows it.
    faulthandler.enable()


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
