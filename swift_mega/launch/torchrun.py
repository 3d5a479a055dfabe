"""Starts ranks on this machine, or joins them where torchrun or Slurm already started them.

On the CPU, ranks are forks of this process: importing torch and Megatron takes many seconds, and forks share the imports. A process
that uses CUDA cannot be forked, so there each rank is a new interpreter (`worker`). After the start, both kinds run the same code (process
group, report, choice of the error to show, end of all ranks), and it is tested on the CPU for both.
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
from swift_mega.launch.rank import DeviceKind, RankSpec

Result = TypeVar("Result")
Start = Literal["auto", "fork", "exec", "here"]
HELD = {signal.SIGINT, *SIGNALS}


def is_first_rank() -> bool:
    """Whether this process prints for the whole run: it is rank 0, or not a rank."""
    return os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process prints an error that all ranks have: it is the first rank on its machine, or not a rank."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def rank_prefix() -> str:
    """The prefix "rank 3: " for messages of a rank that torchrun started, except rank 0; else an empty string."""
    return "" if is_first_rank() else f"rank {os.environ['RANK']}: "


def refuse_joined(command: str) -> None:
    """UserError where several ranks or processes were started to run a command that one process has to run."""
    refuse_copies(os.environ)
    if joined() and world_size() > 1:
        raise UserError(f"{command} starts its ranks itself, but WORLD_SIZE={world_size()} were started; run it alone")


def is_alone() -> bool:
    """Whether this process is the only one of the run: torchrun, Slurm or a caller started no other, and there is no other machine."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size()) == 1
    return world_size() == 1 if joined() else Nodes.from_environment(os.environ).count == 1


def world_size(nproc: int | None = None) -> int:
    """The number of ranks of a run: WORLD_SIZE where ranks were started (`joined`), else (nproc or NPROC_PER_NODE or 1) · NNODES."""
    if joined():
        world = whole(os.environ, "WORLD_SIZE", 1, least=1)
        if nproc is not None and nproc != world and nproc != whole(os.environ, "LOCAL_WORLD_SIZE", world, least=1):
            raise UserError(
                f"--nproc {nproc}, but this process is one of {world} ranks started already; remove --nproc"
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
    """Runs `body(*args)` in `world` ranks with torch.distributed initialised, and returns the result of the first rank.

    body: on the CPU any callable, because a fork has it already; on CUDA an importable module-level function with picklable arguments.
    Its result must be picklable. With NNODES > 1, this machine starts world / NNODES ranks and returns the result of its first one.
    A rank that is already started (`joined`) only enters the group, runs the body, and returns its own result.
    start: "here" runs a single rank inside this process, for a debugger. Group and environment are removed afterwards, but later forks
    of this process may crash or hang because of what gloo leaves behind. So a single rank is a process of its own by default.
    logs: a folder for rank<N>.log, the output of every rank except the first of this machine; None: the logs are deleted.
    timeout_minutes: largest duration of a collective of the default group.

    Raises the UserError that a rank raised, or RankError with the rank's number and its traceback or the signal that killed it.
    No rank outlives the call, also after Ctrl-C or SIGKILL of this process. SIGTERM and SIGHUP are passed on to the ranks, which clean up;
    then `ended.Ended` is raised here unless the caller handles these signals.
    """
    kind = _device_kind() if device_kind == "auto" else device_kind
    if _group_exists(world):
        return body(*args)
    if joined():
        with signals_raise(), _joined_spec(world, kind, timeout_minutes) as spec, rank.process_group(spec):
            return body(*args)
    refuse_copies(os.environ)
    nodes = Nodes.from_environment(os.environ)
    if world % nodes.count:
        raise UserError(f"{world} ranks cannot be spread evenly over NNODES={nodes.count} machines")
    specs = _specs(world, nodes, kind, timeout_minutes)
    if start == "here":
        assert world == 1, "only one rank runs inside this process"
        return _run_here(specs[0], body, args)
    method = start if start != "auto" else ("fork" if kind == "cpu" else "exec")
    with signals_raise():
        return _run_there(specs, body, args, method=method, logs=logs)


def _run_here(spec: RankSpec, body: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    import torch.distributed as dist

    environment = {k: v for k, v in spec.environment().items() if k != "OMP_NUM_THREADS"}
    try:
        with _environment(environment), rank.process_group(spec):
            return body(*args)
    finally:
        # Still initialised where the body raised.
        if dist.is_initialized():
            dist.destroy_process_group()


def _run_there(
    specs: list[RankSpec], body: Callable[..., Result], args: tuple[Any, ...], *, method: str, logs: Path | None
) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="swift_mega-ranks-"))
    try:
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
        if not specs[0].rendezvous:
            specs = [replace(spec, rendezvous=str(folder / "store")) for spec in specs]
        running: dict[int, RankSpec] = {}
        begin = _fork if method == "fork" else _exec
        try:
            with _signals_held():
                for spec in specs:
                    running[begin(spec, folder, logs or folder, body, args)] = spec
        # Where a rank cannot start, or after Ctrl-C, the ranks that already run must end.
        except BaseException as error:
            watch.end_all(running, by=error)
            raise
        watch.wait(running, folder, logs or folder)
        report = rank.read_report(folder, 0)
        assert report is not None
        return pickle.loads(report.result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fork(spec: RankSpec, folder: Path, logs: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    # Imported before the fork, so it is imported once.
    import torch  # noqa: F401

    if spec.threads > 1:
        _end_openmp_threads()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python >= 3.12 warns of a fork in a process with threads. Here the threads are idle pools, which the child creates again.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        rank.settle(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        os.environ.update(_started_environment(spec))
        # Threads of tokenizers do not survive a fork; without this it prints a long warning.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if spec.local_rank:
            rank.redirect_output(rank.log_path(logs, spec.rank))
        rank.run_rank(spec, folder, body, args)
    finally:
        os._exit(1)


def _exec(spec: RankSpec, folder: Path, logs: Path, body: Callable[..., Any], args: tuple[Any, ...]) -> int:
    if body.__module__ == "__main__":
        raise UserError(
            f"{body.__qualname__} is defined in the script or notebook itself, where a fresh process cannot import it: "
            "move it into a module, or start the ranks with torchrun"
        )
    job = folder / f"job{spec.local_rank}"
    job.write_bytes(pickle.dumps((spec, folder, pickle.dumps((body, args)))))
    environment = os.environ | _started_environment(spec)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-m", "swift_mega.launch.worker", str(job), str(os.getpid())]
    actions: list[tuple[Any, ...]] = []
    if spec.local_rank:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(rank.log_path(logs, spec.rank)), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
    # Not subprocess: it reaps children whose Popen object was deleted, but `watch` has to see them end.
    return os.posix_spawn(sys.executable, command, environment, file_actions=actions, setpgroup=0, setsigmask=())


def _specs(world: int, nodes: Nodes, kind: DeviceKind, timeout_minutes: int) -> list[RankSpec]:
    """The ranks of this machine. For a single machine, `_run_there` sets the rendezvous to a file."""
    local = world // nodes.count
    if kind == "cuda":
        _check_devices(local)
    return [
        RankSpec(
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


def _started_environment(spec: RankSpec) -> dict[str, str]:
    values = spec.environment()
    interface = rank.loopback()
    if spec.world == spec.local_world and interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        values["GLOO_SOCKET_IFNAME"] = interface
    return values


@contextmanager
def _joined_spec(world: int, kind: DeviceKind, timeout_minutes: int) -> Iterator[RankSpec]:
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
    # With TORCHELASTIC_USE_AGENT_STORE, torchrun's agent serves the store itself.
    if world > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        rendezvous = f"tcp://{os.environ['MASTER_ADDR']}:{port_of(os.environ, Nodes.port)}"
    local_world = whole(os.environ, "LOCAL_WORLD_SIZE", world, least=1)
    yield RankSpec(
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
    """Whether the caller has initialised torch.distributed; UserError where it has another number of ranks than `world`."""
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
    """Number of threads of one rank. On two cores, two ranks with two threads each are five times slower than with one each."""
    if os.environ.get("OMP_NUM_THREADS"):
        return whole(os.environ, "OMP_NUM_THREADS", 1, least=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world)


def _end_openmp_threads() -> None:
    """Ends the OpenMP thread pool of this thread.

    A fork inherits the data of the pool but not its threads, and waits for them forever in its first parallel region. This concerns
    libgomp; LLVM's library handles forks itself.
    """
    if sys.platform != "linux":
        return
    mapped = Path("/proc/self/maps").read_text()
    for path in {line.split(maxsplit=5)[-1] for line in mapped.splitlines() if "libgomp" in line}:
        # 2 is omp_pause_hard.
        ctypes.CDLL(path).omp_pause_resource_all(2)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks Ctrl-C and similar signals until all started ranks are recorded; otherwise a rank could be left running."""
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
