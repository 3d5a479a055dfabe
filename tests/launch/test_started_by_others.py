"""Launchers that set no ranks, signals that end this process, and a MASTER_PORT that another program uses."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from swift_mega import cli
from swift_mega.cli.table import VERBS
from swift_mega.errors import AgreedError, UserError
from swift_mega.launch import rendezvous
from swift_mega.launch.environments import refuse_copies
from swift_mega.launch.torchrun import run_ranks, world_size

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "NPROC_PER_NODE", *SRUN, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (SRUN, "SLURM_STEP_NUM_TASKS=4: srun started 4 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}, "SLURM_NTASKS=2: srun"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2: srun"),
        (SRUN | {"NNODES": "2"}, "SLURM_STEP_NUM_TASKS=4: srun"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE=3: Open MPI's mpirun started 3 processes"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: an MPI launcher"),
    ],
)
def test_copies_are_refused(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several processes without a rank would each be a whole run. Every verb that writes stops before it reads its inputs."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for arguments in (["convert", "--to", "hf"], ["export"], ["infer"], ["compare"], ["verify"]):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    for start in (world_size, lambda: run_ranks(1, os.getpid)):
        with pytest.raises(
            UserError, match=r"without RANK and WORLD_SIZE.*--ntasks=1.*set in each RANK, WORLD_SIZE=\d, LOCAL"
        ):
            start()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SRUN | {"RANK": "1", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of salloc
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in a job of four
        SRUN | {"NNODES": "4", "NODE_RANK": "2"},  # one process per machine, which starts that machine's ranks
        {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_or_ranks_go_on(environment: dict[str, str]) -> None:
    refuse_copies(environment)


# ------------------------------------------------------------------------------------------------ signals


WRITING_SCRIPT = """
    import os, sys, time
    from dataclasses import replace
    from pathlib import Path
    from swift_mega import cli
    from swift_mega.cli.table import VERBS
    from swift_mega.launch.torchrun import run_ranks
    from swift_mega.outputs import staged
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])

    def write():
        import torch, torch.distributed as dist
        rank = dist.get_rank()
        with staged(folder / f"OUT{rank}", overwrite=False) as staging:
            (staging / "half").write_text("half of it")
            (folder / f"pid{rank}").write_text(str(os.getpid()))
            while True:
                dist.all_reduce(torch.ones(1))

    VERBS["config"] = replace(VERBS["config"], run=lambda _: run_ranks(ranks, write))
    sys.exit(cli.main(["config"]))
"""


@pytest.mark.parametrize(("number", "joined"), [("SIGTERM", False), ("SIGHUP", False), ("SIGTERM", True)])
def test_a_signal_ends_all_and_leaves_nothing(tmp_path: Path, number: str, joined: bool) -> None:
    """A signal to the process that starts ranks, or to a rank: no rank is left, no folder of ranks, no incomplete output."""
    script, temporary = tmp_path / "script.py", tmp_path / "tmp"
    script.write_text(textwrap.dedent(WRITING_SCRIPT))
    temporary.mkdir()
    ranks = 1 if joined else 2
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }
    environment |= {"RANK": "0", "WORLD_SIZE": "1"} if joined else {}
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, str(ranks)], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        pids = _pids(tmp_path, ranks)
        process.send_signal(signal.Signals[number])
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    expected = signal.Signals[number]
    assert said.splitlines() == [f"swift-mega: ended by signal {expected} ({number})"]
    assert process.returncode == 128 + expected
    assert not list(temporary.iterdir()) and not list(tmp_path.glob("OUT*"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _pids(folder: Path, count: int) -> list[int]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        texts = [path.read_text() for path in folder.glob("pid*")]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError(f"{count} ranks did not start")


def test_an_agreed_error_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under torchrun, the first rank of each machine prints an agreed error; an error that a rank raises alone is printed by that rank."""

    def fail(kind: type[UserError]) -> int:
        def run(_: object) -> int:
            raise kind("the disk is full")

        monkeypatch.setitem(VERBS, "config", replace(VERBS["config"], run=run))
        return cli.main(["config"])

    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local, said in (("0", "0", True), ("1", "1", False), ("2", "0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert fail(AgreedError) == 2
        assert ("the disk is full" in capsys.readouterr().err) == said
        assert fail(UserError) == 2
        assert "the disk is full" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ MASTER_PORT


@pytest.fixture
def silent() -> Iterator[int]:
    """A port on which something listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closing() -> Iterator[int]:
    """A port on which every connection is closed at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=close, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("listener", ["silent", "closing"])
def test_a_port_in_use_is_one_error_on_every_rank(
    listener: str, rank: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch alone gives rank 0 a page of C++ output and lets the others wait for ever."""
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.5)
    port = request.getfixturevalue(listener)
    started = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"MASTER_PORT={port} on 127.0.0.1 is in use by another.* the same other port"):
        run_ranks(2, os.getpid)


def test_a_port_in_use_with_several_machines(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that this machine starts raise it, and so do the other machine's."""
    machines = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent)}
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 1.5)
    for name, value in machines.items():
        monkeypatch.setenv(name, value)
    for node in ("0", "1"):
        monkeypatch.setenv("NODE_RANK", node)
        with pytest.raises(UserError, match=f"MASTER_PORT={silent} on 127.0.0.1 is in use"):
            run_ranks(2, os.getpid)


def test_nobody_at_the_master_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=rf"MASTER_PORT={port}: no answer for 0 s \(Connection refused\)"):
        rendezvous.open_store("127.0.0.1", port, 2, serve=False, waiting=0.1)
    with pytest.raises(UserError, match=rf"MASTER_PORT={port}: not all of 2 ranks connected within 1 s"):
        rendezvous.open_store("127.0.0.1", port, 2, serve=True, waiting=1)


def test_no_such_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(UserError, match="MASTER_PORT=70000 in the environment: ports are numbered from 1 to 65535"):
        world_size()
