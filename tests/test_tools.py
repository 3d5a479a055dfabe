"""The conversion tools stand on their own: plain python, and ranks that torchrun started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from swift_mega.convert.hf_files import Checkpoint

TOOLS = Path(__file__).resolve().parent.parent / "tools" / "convert"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tools") / "model", "qwen3_tied", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "start", [(), ("-m", "torch.distributed.run", "--nproc_per_node", "2")], ids=["python", "torchrun"]
)
def test_there_and_back(model: Path, tmp_path: Path, start: tuple[str, ...]) -> None:
    there = run(*start, TOOLS / "hf_to_mcore.py", "--model", model, "--output", tmp_path / "mcore", "--tp", 2)
    assert there.returncode == 0, there.stderr
    back = run(TOOLS / "mcore_to_hf.py", "--mcore", tmp_path / "mcore", "--output", tmp_path / "hf")
    assert back.returncode == 0, back.stderr
    a, b = Checkpoint(model), Checkpoint(tmp_path / "hf")
    assert a.entries.keys() == b.entries.keys()
    assert all(
        torch.equal(a.read(name), b.read(name)) and a.entries[name].dtype == b.entries[name].dtype for name in a.entries
    )


def test_a_mistake_is_one_line_and_status_2(model: Path, tmp_path: Path) -> None:
    wrong = run(TOOLS / "hf_to_mcore.py", "--model", model, "--output", tmp_path / "out", "--tp", 3)
    assert wrong.returncode == 2 and "parallel.tensor=3" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = run(TOOLS / "mcore_to_hf.py", "--mcore", tmp_path, "--output", tmp_path / "out")
    assert (
        missing.returncode == 2
        and "latest_checkpointed_iteration.txt" in missing.stderr
        and "Traceback" not in missing.stderr
    )
    assert not (tmp_path / "out").exists()
