"""The conversion tools stand on their own: plain python, and ranks that torchrun started."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    shown = run(TOOLS / "hf_to_mcore.py", "--model", model, "--tp", 2, "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert "2 ranks" in shown.stdout and shown.stdout.count("\n") >= 3, shown.stdout
    wrong = run(TOOLS / "hf_to_mcore.py", "--model", model, "--tp", 3, "--dry_run")
    assert wrong.returncode == 2 and "parallel.tensor=3" in wrong.stderr and "Traceback" not in wrong.stderr
    assert run(TOOLS / "hf_to_mcore.py", "--model", model).returncode == 2


def test_compare_logits(model: Path, tmp_path: Path) -> None:
    """Status 0 where nothing departs, 1 where something does, 2 and one line where there is nothing to compare."""
    tool, other = TOOLS / "compare_logits.py", tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    same = run(tool, "--a", model, "--b", model, "--b_layout", "pp2")
    assert same.returncode == 0, same.stderr
    assert "A and B are equal within 0.0001 at every point" in same.stdout
    parted = run(
        tool,
        "--a",
        model,
        "--b",
        other,
        "--a_engine",
        "hf",
        "--json",
        tmp_path / "o.json",
        "--plot",
        tmp_path / "o.png",
    )
    assert parted.returncode == 1, parted.stderr
    assert "layer 2 departs first" in parted.stdout
    assert json.loads((tmp_path / "o.json").read_text())["departs"] == "layer 2" and (tmp_path / "o.png").is_file()
    wrong = run(tool, "--a", model, "--b", tmp_path / "absent")
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("compare_logits: error: --b=")
        and wrong.stderr.count("\n") == 1
    )


def test_compare_logits_in_ranks_of_torchrun(model: Path, tmp_path: Path) -> None:
    """Both sides in the same two ranks: transformers on the first one, and a layout; once each on standard output."""
    start = ("-m", "torch.distributed.run", "--nproc_per_node", "2", TOOLS / "compare_logits.py")
    words = ("--a", model, "--b", model, "--dtype", "float64", "--scratch", tmp_path)
    found = run(*start, *words, "--a_engine", "hf", "--b_layout", "tp2-sp")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("A and B are equal within 0.0001") == 1 and "mcore, tp2-sp" in found.stdout
    copies = run(*start, *words, "--b_layout", "pp2")
    assert copies.returncode == 0 and "(mcore, dp2)" in copies.stdout, copies.stderr
    wrong = run(*start, *words, "--b_layout", "tp2-pp2")
    assert wrong.returncode == 1 and wrong.stderr.count("compare_logits: error: ") == 1  # torchrun's own status is 1
    assert not list(tmp_path.iterdir())
