"""A run removes only what it wrote itself: other runs' checkpoints and records, and folders of the user, do not change."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny
from swift_mega.cli import main
from swift_mega.errors import UserError
from swift_mega.train.monitor import RunDirectory
from swift_mega.train.sinks import Appended


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.make_chat(folder / "model", "llama", max_position_embeddings=512, num_hidden_layers=1)
    (folder / "one.jsonl").write_text(json.dumps({"query": "Hi", "response": "Hello"}))
    return folder


def sft(place: Path, out: str, *more: str) -> int:
    return main(
        [
            "sft",
            "--model",
            str(place / "model"),
            "--dataset",
            str(place / "one.jsonl"),
            "--global_batch_size",
            "1",
            "--output_dir",
            str(place / out),
            "--add_version",
            "false",
            "--progress",
            "false",
            "--lora_rank",
            "2",
            *more,
        ]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_its_own_checkpoints_are_removed(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A second run in the same folder, of fewer steps, that keeps one checkpoint."""
    out = place / "out"
    assert sft(place, "out", "--train_iters", "3", "--save_steps", "1") == 0
    for mine in ("checkpoint-1-mine2", "checkpoint-best1", "checkpoint-9", "checkpoint-", "notes"):
        (out / mine).mkdir()
        (out / mine / "thesis.txt").write_text(mine)
    capfd.readouterr()
    assert sft(place, "out", "--train_iters", "2", "--save_steps", "1", "--save_total_limit", "1") == 0
    assert "holds another run's files: its files with the same names were moved to earlier-1/" in capfd.readouterr().out
    kept = {"checkpoint-1-mine2", "checkpoint-best1", "checkpoint-9", "checkpoint-", "notes"}
    assert all((out / mine / "thesis.txt").read_text() == mine for mine in kept)
    theirs = {"args.json", "logging.jsonl", "runs", "images"}
    assert set(names(out)) == kept | theirs | {"checkpoint-2", "checkpoint-3", "earlier-1"}
    assert set(names(out / "earlier-1")) == theirs | {"checkpoint-1", "checkpoint-2"}
    assert [len((folder / "logging.jsonl").read_text().splitlines()) for folder in (out, out / "earlier-1")] == [2, 3]
    assert len(list((out / "runs").iterdir())) == 1


def test_what_a_run_reads_is_not_moved(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that continues from out/checkpoint-1 would overwrite it and the records beside it."""
    assert sft(place, "on", "--train_iters", "1") == 0
    before = names(place / "on")
    assert sft(place, "on", "--train_iters", "1", "--adapters", str(place / "on" / "checkpoint-1")) == 2
    assert "is read by this run, which would write its own checkpoint-1 there; name another" in capfd.readouterr().err
    assert names(place / "on") == before


def test_folders_of_earlier_runs_count_on(tmp_path: Path) -> None:
    """Among other folders with such names; a folder that no run wrote to keeps its images and args.json."""
    directory = RunDirectory(tmp_path, False)
    (tmp_path / "images").mkdir()
    assert directory.put_aside(["checkpoint-1"], []) is None and names(tmp_path) == ["images"]
    (tmp_path / "earlier-x").mkdir()
    for number in (1, 2):
        directory.logging.write_text("{}")
        assert directory.put_aside([], []) == tmp_path / f"earlier-{number}"
    (tmp_path / "earlier-3").write_text("in the way")
    directory.logging.write_text("{}")
    assert directory.put_aside([], []) == tmp_path / "earlier-4"


def test_an_earlier_run_that_cannot_be_moved_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files stay where they are."""
    directory = RunDirectory(tmp_path, False)
    directory.logging.write_text("{}")

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be moved to earlier-1 \(Permission denied\); name another"):
        directory.put_aside([], [])
    assert directory.logging.read_text() == "{}"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Simulates a full file system, also in forked ranks: the first `size` bytes of a file are written, the rest is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    """An incomplete record is removed from the file. Once there is room, it is written before the next one."""
    path = tmp_path / "log"
    path.write_bytes(b"0" * 10)
    file = Appended(path)
    with largest_file(100):
        file.add(b"a" * 60)
        for record in (b"b" * 60, b"c" * 5):
            with pytest.raises(OSError, match="File too large"):
                file.add(record)
            assert path.read_bytes() == b"0" * 10 + b"a" * 60
    file.add(b"d")
    file.close()
    assert path.read_bytes() == b"0" * 10 + b"a" * 60 + b"b" * 60 + b"c" * 5 + b"d"


def test_a_run_outlives_its_plots(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A plot without room is reported; the run continues, and its checkpoint is there."""
    with largest_file(15_000):
        assert sft(place, "plots", "--train_iters", "2") == 0
    told = capfd.readouterr().err
    assert told.count("images/ (plots) of ") == 1 and "cannot be written (File too large); training goes on" in told
    assert {"checkpoint-2", "logging.jsonl"} <= set(names(place / "plots")) and names(place / "plots" / "images") == []


@pytest.mark.parametrize(
    "size, said", [(3_500, "checkpoint-2: File too large"), (900, "args.json cannot be written (File too large)")]
)
def test_a_run_does_not_outlive_its_checkpoints(
    place: Path, size: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line and status 2, no incomplete output, and no incomplete line in the log."""
    with largest_file(size):
        assert sft(place, f"full{size}", "--train_iters", "2") == 2
    told = capfd.readouterr().err
    assert said in told and "Traceback" not in told
    folder = place / f"full{size}"
    assert not [name for name in names(folder) if name.startswith("checkpoint") or name.endswith((".part", ".writing"))]
    if (folder / "logging.jsonl").exists():
        assert all(json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines())


def test_float64_says_what_it_needs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Megatron's distributed optimizer and clipping support float32 at most: an error before a rank starts. A run with the named
    settings works."""
    wide = ("--train_iters", "1", "--torch_dtype", "float64")
    for more in ((), ("--use_distributed_optimizer", "false"), ("--clip_grad", "0")):
        assert sft(place, "wide", *wide, *more) == 2
        assert (
            "set parallel.distributed_optimizer=false and optim.clip_grad=0, or model.dtype=float32"
            in capfd.readouterr().err
        )
    assert not (place / "wide").exists()
    assert sft(place, "wide", *wide, "--use_distributed_optimizer", "false", "--clip_grad", "0") == 0
