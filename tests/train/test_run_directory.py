"""A run removes what it wrote, and nothing else: other runs' checkpoints and records, and folders of the user's, stay as they are."""

import json
from pathlib import Path

import pytest

import tiny
from swift_mega.cli import main
from swift_mega.errors import UserError
from swift_mega.train.monitor import RunDirectory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.make_chat(folder / "model", "llama", max_position_embeddings=512, num_hidden_layers=1)
    (folder / "one.jsonl").write_text(json.dumps({"query": "Hi", "response": "Hello"}))
    return folder


def sft(place: Path, out: str, *more: str) -> int:
    return main([
        "sft", "--model", str(place / "model"), "--dataset", str(place / "one.jsonl"), "--global_batch_size", "1", "--output_dir",
        str(place / out), "--add_version", "false", "--progress", "false", "--lora_rank", "2", *more,
    ])  # fmt: skip


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
    assert "holds another run's files: those of the same names are now in earlier-1/" in capfd.readouterr().out
    kept = {"checkpoint-1-mine2", "checkpoint-best1", "checkpoint-9", "checkpoint-", "notes"}
    assert all((out / mine / "thesis.txt").read_text() == mine for mine in kept)
    theirs = {"args.json", "logging.jsonl", "runs", "images"}
    assert set(names(out)) == kept | theirs | {"checkpoint-2", "checkpoint-3", "earlier-1"}
    assert set(names(out / "earlier-1")) == theirs | {"checkpoint-1", "checkpoint-2"}
    assert [len((folder / "logging.jsonl").read_text().splitlines()) for folder in (out, out / "earlier-1")] == [2, 3]
    assert len(list((out / "runs").iterdir())) == 1


def test_what_a_run_reads_is_not_moved(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Training that goes on from out/checkpoint-1 would write over it, and over the records beside it."""
    assert sft(place, "on", "--train_iters", "1") == 0
    before = names(place / "on")
    assert sft(place, "on", "--train_iters", "1", "--adapters", str(place / "on" / "checkpoint-1")) == 2
    assert "is read by this run, which would write its own checkpoint-1 there; name another" in capfd.readouterr().err
    assert names(place / "on") == before


def test_folders_of_earlier_runs_count_on(tmp_path: Path) -> None:
    """Whatever else is called so; a folder that no run wrote to keeps its images and args.json."""
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
