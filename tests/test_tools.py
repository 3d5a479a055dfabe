"""The conversion tools run by themselves: with plain python, and as ranks that torchrun started.

One test starts new interpreters, and two start torchrun. The other tests fork, so that Megatron is imported once.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from swift_mega.convert.files.hf_files import Checkpoint
from tests.forked import run_script as run

TOOLS = Path(__file__).resolve().parent.parent / "tools" / "convert"


def started(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs a tool in a new interpreter."""
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
    there = started(*start, TOOLS / "hf_to_mcore.py", "--model", model, "--output", tmp_path / "mcore", "--tp", 2)
    assert there.returncode == 0, there.stderr
    back = (run if start else started)(
        TOOLS / "mcore_to_hf.py", "--mcore", tmp_path / "mcore", "--output", tmp_path / "hf"
    )
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
    """Status 0 where no point differs, 1 where one does, 2 and one line where nothing can be compared."""
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
        "--a_backend",
        "hf",
        "--json",
        tmp_path / "o.json",
        "--plot",
        tmp_path / "o.png",
    )
    assert parted.returncode == 1, parted.stderr
    assert "first difference at layer 2" in parted.stdout
    assert (
        json.loads((tmp_path / "o.json").read_text())["first_difference"] == "layer 2"
        and (tmp_path / "o.png").is_file()
    )
    wrong = run(tool, "--a", model, "--b", tmp_path / "absent")
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("compare_logits: error: --b=")
        and wrong.stderr.count("\n") == 1
    )


def test_compare_logits_in_ranks_of_torchrun(model: Path, tmp_path: Path) -> None:
    """Both sides run in the same two ranks: transformers on the first rank, and a layout. Standard output has each line once."""
    start = ("-m", "torch.distributed.run", "--nproc_per_node", "2", TOOLS / "compare_logits.py")
    words = ("--a", model, "--b", model, "--dtype", "float64", "--scratch", tmp_path)
    found = started(*start, *words, "--a_engine", "hf", "--b_layout", "tp2-sp")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("A and B are equal within 1e-05") == 1 and "mcore, tp2-sp" in found.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_compare_logits_in_ranks_of_torchrun_of_other_layouts(model: Path, tmp_path: Path) -> None:
    """A smaller layout runs as copies; a layout that does not fit is an error. By default the same is tested in forked ranks, below."""
    start = ("-m", "torch.distributed.run", "--nproc_per_node", "2", TOOLS / "compare_logits.py")
    words = ("--a", model, "--b", model, "--dtype", "float64", "--scratch", tmp_path)
    copies = started(*start, *words, "--b_layout", "pp2")
    assert copies.returncode == 0 and "(mcore, dp2)" in copies.stdout, copies.stderr
    wrong = started(*start, *words, "--b_layout", "tp2-pp2")
    assert wrong.returncode == 1 and wrong.stderr.count("compare_logits: error: ") == 1  # torchrun's own status is 1
    assert not list(tmp_path.iterdir())


def of_rank(words: list[str]) -> tuple[int, str, str]:
    """In a rank: status and both streams of the tool."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["compare_logits.py", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(TOOLS / "compare_logits.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


def test_compare_logits_in_ranks_that_are_there(ranks: Any, model: Path, tmp_path: Path) -> None:
    """A smaller layout runs as copies; a layout that does not fit is an error."""
    words = [*map(str, ("--a", model, "--b", model, "--dtype", "float64", "--scratch", tmp_path)), "--b_layout"]
    status, out, err = ranks(2, of_rank, [*words, "pp2"])
    assert status == 0 and "(mcore, dp2)" in out, err
    status, out, err = ranks(2, of_rank, [*words, "tp2-pp2"])
    assert status == 2 and err.count("compare_logits: error: ") == 1 and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
