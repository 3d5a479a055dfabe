"""Ranks are started, watched and ended: real processes, real gloo."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swift_mega.device.local_rank import device_index, find_local_rank
from swift_mega.errors import UserError
from swift_mega.launch.rank import refuse_shared_devices
from swift_mega.launch.torchrun import Nodes, is_alone, joined, run_ranks, world_size
from swift_mega.launch.watch import RankError
from swift_mega.parallel.agree import gather

LAUNCH_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def sum_of_ranks(scale: int) -> dict[str, object]:
    total = torch.tensor([float(dist.get_rank() * scale)])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {
        "total": total.item(),
        "rank": dist.get_rank(),
        "environment": [os.environ[name] for name in names],
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
    }


def specs_of_all() -> tuple[dict[str, object], list[tuple[int, timedelta]]]:
    assert dist.group.WORLD is not None
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    return sum_of_ranks(10), gather((device_index(find_local_rank(os.environ), 2), timeout))


def fail_on(rank: int, error: type[Exception]) -> None:
    if dist.get_rank() == rank:
        raise error(f"number 7 is wrong on rank {rank}")
    dist.barrier()  # never returns: the other rank is gone


def note_and_hang(folder: Path, failing: int, how: str) -> None:
    (folder / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
    print("at the barrier", flush=True)
    dist.barrier()
    if dist.get_rank() == failing:
        time.sleep(0.1)
        if how == "leave":
            os._exit(3)
        os.kill(os.getpid(), signal.Signals[how])
    time.sleep(600)


def fail_among_collectives(rank: int, how: str) -> None:
    values = torch.ones(100_000)
    for step in range(1000):
        dist.all_reduce(values)
        if step == 30 and dist.get_rank() == rank:
            if how == "leave":
                os._exit(0)
            if how == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("mine") if how == "user" else KeyError("mine")


def leave_a_child_behind(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"pid{dist.get_rank()}").write_text(str(child.pid))


def talk() -> None:
    print(f"rank {dist.get_rank()} speaks")


def multiply(size: int) -> float:
    """More than one OpenMP thread and a backward pass: a fork of a process that has used both could hang."""
    x = torch.ones(size, size, requires_grad=True)
    (x @ x).sin().sum().backward()
    assert x.grad is not None
    return float(x.grad.sum())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second error: it ended between open and read
        return False


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def noted(folder: Path, count: int, seconds: float = 60.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.glob("pid*")]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError(f"{count} ranks did not start")


@pytest.mark.parametrize("world", [2, 3])
def test_result_of_the_first_rank(world: int) -> None:
    """Every rank takes part in a collective, and rank 0's result comes back."""
    result = run_ranks(world, sum_of_ranks, 10)
    assert result["total"] == 10 * sum(range(world))
    assert result["rank"] == 0
    assert result["environment"] == ["0", str(world), "0", str(world)]
    assert result["pid"] != os.getpid()
    assert not dist.is_initialized() and not joined()


def test_fresh_interpreters_do_the_same() -> None:
    """Ranks on CUDA start this way: each in a new interpreter. Each rank finds its own device and the timeout."""
    result, specs = run_ranks(2, specs_of_all, start="exec", device_kind="cpu", timeout_minutes=7)
    assert result["total"] == 10 and result["environment"] == ["0", "2", "0", "2"]
    assert specs == [(0, timedelta(minutes=7)), (1, timedelta(minutes=7))]


def test_fresh_interpreters_report_a_user_error() -> None:
    with pytest.raises(UserError, match=r"^number 7 is wrong on rank 1$"):
        run_ranks(2, fail_on, 1, UserError, start="exec", device_kind="cpu")


def test_a_fresh_interpreter_needs_an_importable_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sum_of_ranks, "__module__", "__main__")
    with pytest.raises(
        UserError, match=r"sum_of_ranks is defined in the script or notebook itself.*move it into a module"
    ):
        run_ranks(2, sum_of_ranks, 1, start="exec", device_kind="cpu")


def test_one_rank_is_a_process_too() -> None:
    result = run_ranks(1, sum_of_ranks, 10)
    assert result["pid"] != os.getpid() and result["environment"] == ["0", "1", "0", "1"]


def run_here() -> dict[str, object]:
    result = run_ranks(1, sum_of_ranks, 10, start="here")
    with pytest.raises(KeyError, match="number 7"):
        run_ranks(1, fail_on, 0, KeyError, start="here")
    return result | {"left": dist.is_initialized() or joined(), "starter": os.getpid()}


def test_one_rank_can_run_here_and_leaves_no_group() -> None:
    """Its own exception is raised unchanged. In a new process, because this process has to fork ranks later."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(run_here).result(timeout=120)
    assert result["pid"] == result["starter"] and result["environment"] == ["0", "1", "0", "1"]
    assert not result["left"]


def use_the_group_that_is_there() -> int:
    own = run_ranks(2, sum_of_ranks, 10)
    with pytest.raises(UserError, match="already initialised with 2 ranks, but the settings need 3"):
        run_ranks(3, talk)
    return int(own["pid"] == os.getpid())


def test_an_existing_group_is_used() -> None:
    assert run_ranks(2, use_the_group_that_is_there) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_is_raised_as_it_was(rank: int) -> None:
    with pytest.raises(UserError, match=f"^number 7 is wrong on rank {rank}$"):
        run_ranks(2, fail_on, rank, UserError)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_error_keeps_its_rank_and_traceback(rank: int) -> None:
    """The error names the rank that failed first, not the peer that lost its connection to it."""
    with pytest.raises(RankError, match=rf"rank {rank} of 2 failed:(?s:.*)fail_on(?s:.*)KeyError: 'number 7 is wrong"):
        run_ranks(2, fail_on, rank, KeyError)


def test_a_killed_rank_is_said_and_the_others_are_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(
        RankError, match=r"rank 2 of 3 was killed by signal 9 \(SIGKILL\); most often .* memory runs out"
    ):
        run_ranks(3, note_and_hang, tmp_path, 2, "SIGKILL")
    assert time.monotonic() - begin < 20
    assert gone(noted(tmp_path, 3), 0)


def test_a_crash_shows_the_last_output(tmp_path: Path) -> None:
    """The rank's output and the Python stack of the crash."""
    message = (
        r"rank 1 of 2 was killed by signal 11 \(SIGSEGV\)\nits last output:\nat the barrier(?s:.*)Segmentation fault"
    )
    with pytest.raises(RankError, match=message + "(?s:.*)note_and_hang"):
        run_ranks(2, note_and_hang, tmp_path, 1, "SIGSEGV")
    assert gone(noted(tmp_path, 2), 0)


def test_a_rank_that_leaves_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 ended with status 3 before its work was complete"):
        run_ranks(2, note_and_hang, tmp_path, 1, "leave")
    assert gone(noted(tmp_path, 2), 0)


@pytest.mark.parametrize("how", ["user", "defect", "SIGKILL", "leave"])
def test_the_cause_is_named_and_not_its_consequences(how: str) -> None:
    """During collectives, every peer fails within a millisecond with an error of its own."""
    expected = {
        "user": "^mine$",
        "defect": "rank 1 of 3 failed(?s:.*)KeyError: 'mine'",
        "SIGKILL": "rank 1 of 3 was killed",
    }
    kind = UserError if how == "user" else RankError
    for _ in range(3):
        with pytest.raises(kind, match=expected.get(how, "rank 1 ended with status 0")):
            run_ranks(3, fail_among_collectives, 1, how)


def test_children_of_ranks_are_ended_too(tmp_path: Path) -> None:
    run_ranks(2, leave_a_child_behind, tmp_path)
    assert gone(noted(tmp_path, 2))


HANGING_SCRIPT = """
    import sys, time, os
    from pathlib import Path
    from swift_mega.launch.torchrun import run_ranks
    folder = Path(sys.argv[1])

    def body():
        import torch.distributed as dist
        (folder / f"pid{dist.get_rank()}").write_text(str(os.getpid()))
        time.sleep(600)

    run_ranks(2, body)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_starter(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGKILL of the starting process end its ranks (test_started_by_others.py tests SIGTERM and SIGHUP)."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(HANGING_SCRIPT))
    starter = subprocess.Popen(
        [sys.executable, script, tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        env=script_environment(TMPDIR=str(tmp_path)),
    )
    try:
        pids = noted(tmp_path, 2)
        starter.send_signal(number)
        _, errors = starter.communicate(timeout=30)
    finally:
        starter.kill()
        starter.wait()
    assert gone(pids)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def script_environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | more


def test_other_ranks_are_quiet_and_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, talk, logs=tmp_path / "logs")
    shown = capfd.readouterr().out
    assert "rank 0 speaks" in shown and "rank 1 speaks" not in shown
    assert (tmp_path / "logs" / "rank1.log").read_text() == "rank 1 speaks\n"


def test_threads_survive_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has an OpenMP pool. A fork that uses threads must not wait for threads of the pool, which it does not have."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        expected = multiply(300)
        assert run_ranks(2, multiply, 300) == pytest.approx(expected)
    finally:
        torch.set_num_threads(before)


def test_one_thread_per_rank_when_ranks_fill_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert run_ranks(2, sum_of_ranks, 1)["threads"] == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert run_ranks(2, sum_of_ranks, 1)["threads"] == 2


JOINING_SCRIPT = """
    import sys
    from swift_mega.launch.torchrun import run_ranks, world_size

    def body():
        import torch, torch.distributed as dist
        one = torch.ones(1)
        dist.all_reduce(one)
        return f"rank {dist.get_rank()} counts {one.item():.0f}"

    print(run_ranks(world_size(), body))
"""


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("how", ["nodes", "joined"])
def test_several_machines_meet(tmp_path: Path, how: str) -> None:
    """Two starters with NNODES=2 and two ranks each make one run of four; two starters with one rank each make one of two."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(JOINING_SCRIPT))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    each = [
        {"NNODES": "2", "NODE_RANK": str(i), "NPROC_PER_NODE": "2"}
        if how == "nodes"
        else {"RANK": str(i), "WORLD_SIZE": "2"}
        for i in range(2)
    ]
    starters = [
        subprocess.Popen(
            [sys.executable, script], stdout=subprocess.PIPE, text=True, env=script_environment(**shared, **own)
        )
        for own in each
    ]
    try:
        said = [starter.communicate(timeout=120)[0] for starter in starters]
    finally:
        for starter in starters:
            starter.kill()
            starter.wait()
    expected = ["rank 0 counts 4", "rank 2 counts 4"] if how == "nodes" else ["rank 0 counts 2", "rank 1 counts 2"]
    assert [text.strip().splitlines()[-1] for text in said] == expected


def test_a_process_that_is_alone(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment of torchrun or of several machines, and by the existing process group."""
    assert is_alone() and ranks(1, is_alone) and not ranks(2, is_alone)
    monkeypatch.setenv("NPROC_PER_NODE", "2")  # the number of ranks that it would start
    assert is_alone()
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert not is_alone()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not is_alone()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_alone()


def test_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world_size() == 1
    assert world_size(3) == 3
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert world_size() == 2
    assert world_size(4) == 4
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert world_size() == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size() == 8
    with pytest.raises(
        UserError, match="--nproc 3, but this process is one of 8 ranks started already; remove --nproc"
    ):
        world_size(3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "two"}, "NNODES='two' in the environment: expected a whole number of at least 1"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE='0' in the environment: expected a whole number of at least 1"),
        ({"NNODES": "2"}, "NNODES=2 without MASTER_ADDR: set it to the address of the machine with NODE_RANK=0"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2: machines are numbered from 0 to 1"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment"),
    ],
)
def test_a_wrong_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        world_size()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4"}, "the settings need 2 ranks, but WORLD_SIZE=4 were started: start 2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: ranks are numbered from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not: start the ranks with torchrun"),
        ({"NNODES": "3", "MASTER_ADDR": "a"}, "2 ranks cannot be spread evenly over NNODES=3 machines"),
    ],
)
def test_a_wrong_world_is_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        run_ranks(2, talk)


def test_too_few_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="--nproc 0: at least 1 rank is needed"):
        world_size(0)


def test_missing_cuda_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="2 ranks on this machine, which has 1 GPUs, and NCCL refuses two ranks on one: use --nproc 1"
    ):
        run_ranks(2, talk, device_kind="cuda")


def test_two_ranks_on_one_gpu_are_refused() -> None:
    refuse_shared_devices(["GPU-a", "GPU-b"])
    with pytest.raises(
        UserError, match=r"ranks 1 and 2 have the same GPU \(GPU-b\), and NCCL refuses.*set LOCAL_RANK in each"
    ):
        refuse_shared_devices(["GPU-a", "GPU-b", "GPU-b"])


def test_one_machine_is_the_default() -> None:
    assert Nodes.from_environment({}) == Nodes(count=1, rank=0, address="127.0.0.1", port=29500)
