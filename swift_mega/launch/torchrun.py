"""Ranks: started on this machine, or joined where torchrun or Slurm already started them.

On CPU ranks are forks of this process. Importing torch and Megatron takes many seconds and a fork takes none, so the
imports are paid once. CUDA can't be forked; there each rank is a fresh interpreter (`worker`). Everything after the
start (the group, the report, who is to blame, how all are ended) is one code for both, and is tested on CPU for both.
"""

import ctypes
import os
import pickle
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from swift_mega.config.schema import TIMEOUT_MINUTES
from swift_mega.device.local_rank import find_local_rank, whole
from swift_mega.errors import UserError
from swift_mega.launch import rank, watch
from swift_mega.launch.ended import SIGNALS, signals_raise
from swift_mega.launch.environments import Nodes, joined, port_of, refuse_copies
from swift_mega.launch.rank import DeviceKind, Seat

Result = TypeVar("Result")
Start = Literal["auto", "fork", "exec", "here"]
HELD = {signal.SIGINT, *SIGNALS}


def is_first_rank() -> bool:
    """Whether this process speaks for the run: rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process says on its machine what all ranks have to say: of those that were started the first one there."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def rank_prefix() -> str:
    """ "rank 3: " in a rank other than the first of those that torchrun started, else "" """
    return "" if is_first_rank() else f"rank {os.environ['RANK']}: "


def refuse_joined(command: str) -> None:
    """For a command that runs once: raises UserError where several ranks, or copies of it, were started to run it."""
    refuse_copies(os.environ)
    if joined() and world_size() > 1:
        raise UserError(f"{command} starts its ranks itself, but WORLD_SIZE={world_size()} were started; run it alone")


def is_alone() -> bool:
    """Whether no other process works on the same run: none that torchrun, Slurm or a caller started, and no other machine."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size()) == 1
    return world_size() == 1 if joined() else Nodes.from_environment(os.environ).count == 1


def world_size(nproc: int | None = None) -> int:
    """How many ranks a run has: those that were started (joined), else nproc or NPROC_PER_NODE or 1, times NNODES."""
    if joined():
        world = whole(os.environ, "WORLD_SIZE", 1, least=1)
        if nproc is not None and nproc != world and nproc != whole(os.environ, "LOCAL_WORLD_SIZE", world, least=1):
            raise UserError(
                f"--nproc {nproc}, but this process is one of {world} ranks started already; leave --nproc out"
            )
        return world
    refuse_copies(os.environ)
    if nproc is not None and nproc < 1:
        raise UserError(f"--nproc {nproc}: at least 1 rank is needed")
    local = nproc if nproc is not None else whole(os.environ, "NPROC_PER_NODE", 1, least=1)
    return local * Nodes.from_environment(os.environ).count


def run_ranks(
    world: int,
    body: Callable[..., Result],
    *args: Any,
    device_kind: DeviceKind | Literal["auto"] = "auto",
    start: Start = "auto",
    logs: Path | None = None,
    timeout_minutes: int = TIMEOUT_MINUTES,
) -> Result:
    """Run `body(*args)` in `world` ranks, each with torch.distributed initialised, and return the first rank's result.

    body: on CPU anything (a fork has it already); on CUDA an importable module-level function with picklable arguments.
    Its result must be picklable. With NNODES > 1 this machine starts world / NNODES of the ranks and returns its first
    one's result. A rank that was started already (`joined`) only enters the group, runs, and returns its own result.
    start: "here" runs one rank inside this process, for a debugger. Group and environment are taken away afterwards, but
    what gloo leaves behind makes later forks of this process crash or hang, so that one rank is a process too otherwise.
    logs: a folder that keeps rank<N>.log, the output of every rank but the machine's first; None keeps nothing.
    timeout_minutes: how long a collective of the default group may take.

    Raises UserError as the rank raised it; RankError with the rank and its traceback, or the signal that killed it.
    Whatever happens, Ctrl-C and SIGKILL of this process included, no rank outlives the call. SIGTERM and SIGHUP are passed on to
    the ranks, which undo what they have begun, and raise `ended.Ended` here unless the caller handles them.
    """
    kind = _device_kind() if device_kind == "auto" else device_kind
    if _group_exists(world):
        return body(*args)
    if joined():
        with signals_raise(), _joined_seat(world, kind, timeout_minutes) as seat, rank.process_group(seat):
            return body(*args)
    refuse_copies(os.environ)
    nodes = Nodes.from_environment(os.environ)
    if world % nodes.count:
        raise UserError(f"{world} ranks cannot be spread evenly over NNODES={nodes.count} machines")
    seats = _seats(world, nodes, kind, timeout_minutes)
    if start == "here":
        assert world == 1, "only one rank runs inside this process"
        return _run_here(seats[0], body, args)
    method = start if start != "auto" else ("fork" if kind == "cpu" else "exec")
    with signals_raise():
        return _run_there(seats, body, args, method=method, logs=logs)


def _run_here(seat: Seat, body: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    import torch.distributed as dist

    environment = {k: v for k, v in seat.environment().items() if k != "OMP_NUM_THREADS"}
    try:
        with _environment(environment), rank.process_group(seat):
            return body(*args)
    finally:
        if dist.is_initialized():  # the body raised
            dist.destroy_process_group()


def _run_there(
    seats: list[Seat], body: Callable[..., Result], args: tuple[Any, ...], *, method: str, logs: Path | None
) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="swift_mega-ranks-"))
    try:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        if not seats[0].rendezvous:
            seats = [replace(seat, rendezvous=str(folder / "store")) for seat in seats]
        running: dict[int, Seat] = {}
        begin = _fork if method == "fork" else _exec
        try:
            with _signals_held():
                for seat in seats:
                    running[begin(seat, folder, logs or folder, body, args)] = seat
        except BaseException as error:  # a rank that cannot start, or Ctrl-C, must not leave the ones before it
            watch.end_all(running, by=error)
            raise
        watch.wait(running, folder, logs or folder)
        report = rank.read_report(folder, 0)
        assert report is not None
        return pickle.loads(report.result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fork(seat: Seat, folder: Path, logs: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    import torch  # noqa: F401  before the fork, so that it is imported once

    if seat.threads > 1:
        _end_openmp_threads()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python >= 3.12 warns of a fork beside threads. Those here are idle pools that the child makes anew.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        rank.settle(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        os.environ.update(_started_environment(seat))
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # its threads do not survive a fork; it warns at length
        if seat.local_rank:
            rank.redirect_output(rank.log_path(logs, seat.rank))
        rank.run_seat(seat, folder, body, args)
    finally:
        os._exit(1)


def _exec(seat: Seat, folder: Path, logs: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    if body.__module__ == "__main__":
        raise UserError(
            f"{body.__qualname__} is defined in the script or notebook itself, where a fresh process cannot import it: "
            "move it into a module, or start the ranks with torchrun"
        )
    job = folder / f"job{seat.local_rank}"
    job.write_bytes(pickle.dumps((seat, folder, pickle.dumps((body, args)))))
    environment = os.environ | _started_environment(seat)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "swift_mega.launch.worker", str(job), str(os.getpid())]
    actions: list[tuple[Any, ...]] = []
    if seat.local_rank:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(rank.log_path(logs, seat.rank)), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
    # not subprocess, which reaps forgotten children on its own; `watch` must be the one to see them end
    return os.posix_spawn(sys.executable, command, environment, file_actions=actions, setpgroup=0, setsigmask=())


def _seats(world: int, nodes: Nodes, kind: DeviceKind, timeout_minutes: int) -> list[Seat]:
    """This machine's ranks; the rendezvous of a single machine is a file that `_run_there` names."""
    local = world // nodes.count
    if kind == "cuda":
        _check_devices(local)
    return [
        Seat(
            rank=nodes.rank * local + local_rank,
            world=world,
            local_rank=local_rank,
            local_world=local,
            kind=kind,
            threads=_threads(local),
            rendezvous=f"tcp://{nodes.address}:{nodes.port}" if nodes.count > 1 else "",
            timeout_minutes=timeout_minutes,
        )
        for local_rank in range(local)
    ]


def _started_environment(seat: Seat) -> dict[str, str]:
    values = seat.environment()
    interface = rank.loopback()
    if seat.world == seat.local_world and interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        values["GLOO_SOCKET_IFNAME"] = interface
    return values


@contextmanager
def _joined_seat(world: int, kind: DeviceKind, timeout_minutes: int) -> Iterator[Seat]:
    started = whole(os.environ, "WORLD_SIZE", 1, least=1)
    number = whole(os.environ, "RANK", 0, least=0)
    if started != world:
        raise UserError(f"the settings need {world} ranks, but WORLD_SIZE={started} were started: start {world}")
    if number >= world:
        raise UserError(f"RANK={number} with WORLD_SIZE={world}: ranks are numbered from 0 to {world - 1}")
    if world > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(
            f"RANK={number} and WORLD_SIZE={world} are set, but MASTER_ADDR and MASTER_PORT are not: start the ranks "
            "with torchrun, or set both, or unset RANK and WORLD_SIZE to let swift-mega start them"
        )
    rendezvous = "env://" if world > 1 else ""
    if (
        world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ):  # torchrun's agent serves the store itself
        rendezvous = f"tcp://{os.environ['MASTER_ADDR']}:{port_of(os.environ, Nodes.port)}"
    local_world = whole(os.environ, "LOCAL_WORLD_SIZE", world, least=1)
    yield Seat(
        rank=number,
        world=world,
        local_rank=find_local_rank(os.environ),
        local_world=local_world,
        kind=kind,
        threads=_threads(local_world),
        rendezvous=rendezvous,
        timeout_minutes=timeout_minutes,
    )


def _group_exists(world: int) -> bool:
    """Whether torch.distributed is initialised by whoever called, with the right size."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    if dist.get_world_size() != world:
        raise UserError(
            f"torch.distributed is already initialised with {dist.get_world_size()} ranks, but the settings need "
            f"{world}: call torch.distributed.destroy_process_group() first"
        )
    return True


def _device_kind() -> DeviceKind:
    from swift_mega.device.device import has_cuda

    return "cuda" if has_cuda() else "cpu"


def _check_devices(local: int) -> None:
    import torch

    if (there := torch.cuda.device_count()) < local:
        raise UserError(
            f"{local} ranks on this machine, which has {there} GPUs, and NCCL refuses two ranks on one: use --nproc {there} or fewer"
        )


def _threads(local_world: int) -> int:
    """Threads of one rank. Two ranks with two threads each on two cores are five times slower than with one each."""
    if os.environ.get("OMP_NUM_THREADS"):
        return whole(os.environ, "OMP_NUM_THREADS", 1, least=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world)


def _end_openmp_threads() -> None:
    """Let go of this thread's OpenMP pool. A fork inherits the pool's book-keeping and not its threads, and waits for
    them for ever at its first parallel region (libgomp; LLVM's library handles forks itself)."""
    if sys.platform != "linux":
        return
    mapped = Path("/proc/self/maps").read_text()
    for path in {line.split(maxsplit=5)[-1] for line in mapped.splitlines() if "libgomp" in line}:
        ctypes.CDLL(path).omp_pause_resource_all(2)  # omp_pause_hard


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and its like wait until every rank that was started is also known, or one could be forgotten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
