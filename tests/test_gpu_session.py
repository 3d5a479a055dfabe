"""The driver of `make gpu-check`: stages that end their process, which checks are BAD, the message where something is missing, and the
page."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_session  # noqa: E402

from benchmarks.gpu_check import page  # noqa: E402
from benchmarks.gpu_check.record import Record  # noqa: E402
from benchmarks.gpu_check.stages import STAGES  # noqa: E402

ABOUT = {"command": "python gpu_session.py", "commit": "abc"}
WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu_check.record import Record
record = Record(Path(sys.argv[1]))
for name in sys.argv[2:]:
    if name == "early":
        os._exit(3)
    stage = record.begin(name, command="c", commit="abc")
    stage.check("a number", 1.0, 2.0)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    record.end(name, "Traceback\\nValueError: 3" if name == "raises" else None)
"""


def run(path: Path, stages: Sequence[str], limit: float = 30.0) -> tuple[Record, int]:
    """The record, and the number of processes that were started."""
    started = []

    def start(names: Sequence[str]) -> "subprocess.Popen[bytes]":
        started.append(names)
        return subprocess.Popen([sys.executable, "-c", WORKER, path, *names], cwd=ROOT)

    return gpu_session.run_stages(stages, path, start, about=ABOUT, limit=limit), len(started)


def test_a_stage_costs_itself_alone(tmp_path: Path) -> None:
    """A stage that raises, one that kills its process and one that hangs; the results of other stages, and their earlier results, stay."""
    record, processes = run(tmp_path / "gpu.json", ["raises", "dies", "hangs", "fine"], limit=1.0)
    assert {name: entry["state"] for name, entry in record.stages.items()} == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "fine": "done",
    }
    assert processes == 3
    assert "status -6" in record.stages["dies"]["error"]
    assert record.stages["hangs"]["error"] == "hangs took more than 1 s and was killed"
    assert all(len(entry["checks"]) == 1 for entry in record.stages.values())
    assert record.bad(record.stages) == [f"{name}: did not finish" for name in ("raises", "dies", "hangs")]


def test_a_process_that_does_not_start_ends_the_session(tmp_path: Path) -> None:
    record, processes = run(tmp_path / "gpu.json", ["early", "fine"])
    assert processes == 1
    assert [entry["error"] for entry in record.stages.values()] == ["the process ended with status 3"] * 2


def test_stages_of_a_later_run_replace_their_own(tmp_path: Path) -> None:
    run(tmp_path / "gpu.json", ["dies", "fine"])
    record, _ = run(tmp_path / "gpu.json", ["fine"])
    assert [entry["state"] for entry in record.stages.values()] == ["failed", "done"]


@pytest.mark.parametrize(
    ("value", "ok"), [(0.5, True), (1.0, True), (1.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_what_is_bad(tmp_path: Path, value: float, ok: bool) -> None:
    record = Record(tmp_path / "gpu.json")
    record.begin("blocks", **ABOUT).check("error", value, 1.0)
    record.end("blocks")
    assert Record(record.path).bad(["blocks"]) == ([] if ok else ["blocks: error"])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_session.missing() == {}
    versions = {"transformers": "5.17.0"}

    def version(name: str) -> str:
        if name == "megatron-core":
            raise gpu_session.importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, "99") if name in ("torch", "transformers") else real(name)

    real = gpu_session.importlib.metadata.version
    monkeypatch.setattr(gpu_session.importlib.metadata, "version", version)
    lacking = gpu_session.missing()
    assert {text.partition(">")[0]: there for text, there in lacking.items()} == {
        "megatron-core": "nothing",
        "transformers": "5.17.0",
    }
    said = gpu_session.refuse(lacking, "NVIDIA H200", small=False)
    assert said is not None and "(5.17.0 is installed)" in said and "GPU_PYTHON=python3" in said


def test_no_gpu_is_said() -> None:
    assert gpu_session.refuse({}, None, small=True) is None
    assert gpu_session.refuse({}, "NVIDIA H200", small=False) is None
    said = gpu_session.refuse({}, None, small=False)
    assert said is not None and "torch finds no GPU" in said and "--small" in said


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_session.main(["--stages", "facts,speeed"])
    assert "no stage speeed; there are facts," in capsys.readouterr().err


def test_the_page_of_results(tmp_path: Path) -> None:
    """The newest file of each GPU, with what is BAD, failed, left out and not installed."""
    for day, value in ((1, 9.0), (2, 0.25)):
        record = Record(tmp_path / f"gpu-{day}.json")
        record.found |= {"device": "NVIDIA X1", "date": f"2026-12-0{day}T10:00:00+00:00"}
        stage = record.begin("facts", **ABOUT)
        stage.fact("flash-attn", "not installed")
        record.end("facts")
        stage = record.begin("memory", **ABOUT)
        stage.check("|formula / allocated - 1|", value, 0.05)
        record.end("memory")
        record.begin("speed", **ABOUT)
        record.end("speed", "Traceback (most recent call last)\nOutOfMemoryError: 3 GiB")
    made = page.page(page.newest(tmp_path))
    said = made[made.index("## NVIDIA X1, 2026-12-02") :]
    left_out = ", ".join(name for name in STAGES if name not in ("facts", "memory", "speed"))
    assert f"0 of 1 checks ok; stages that did not finish: speed; stages that were not run: {left_out}." in said
    assert "| \\|formula / allocated - 1\\| | 0.25 | 0.05 | **BAD** |" in said
    assert "OutOfMemoryError: 3 GiB" in said and "Traceback" not in said
    assert "Not installed, so not shown: flash-attn." in said
    assert "None: no GPU" not in made and "None: no GPU" in page.page([])


def test_every_stage_is_a_module() -> None:
    folder = ROOT / "benchmarks" / "gpu_check"
    for name in STAGES:
        assert "def run(bench: Bench, stage: Stage) -> None:" in (folder / f"{name}.py").read_text(), name
