"""Importing the api changes nothing in the process and is quick; a call sets the device up before it imports Megatron."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swift_mega.api
import tiny
from swift_mega import api

FOLDER = Path(swift_mega.api.__file__).parent
LIGHT = {"__init__.py", "candidate.py", "ready.py"}

PROGRAM = """
import json, sys
import torch
before = {name: getattr(torch.cuda, name) for name in ("current_device", "synchronize", "Stream", "manual_seed")}
tensor = torch.zeros
from swift_mega import api
from swift_mega.api import Candidate, Parallel, load_recipe, plan, train
untouched = torch.zeros is tensor and all(getattr(torch.cuda, name) is was for name, was in before.items())
heavy = sorted({"megatron", "transformers", "peft", "numpy.random"} & sys.modules.keys())
try:
    torch.zeros(1, device="cuda")
    refused = ""
except (AssertionError, RuntimeError) as error:
    refused = type(error).__name__
found = plan(source=sys.argv[1])
print(json.dumps({
    "untouched": untouched, "heavy": heavy, "refused": refused, "table": found.table(), "made": str(torch.zeros(1, device="cuda").device),
    "result": api.TrainResult.__name__,
}))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is patched")
def test_a_call_sets_up_and_an_import_does_not(tmp_path: Path) -> None:
    """In a new interpreter: after the import torch.cuda is torch's own and Megatron is not imported; then `plan` works."""
    model = tiny.make(tmp_path / "llama", "llama")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["untouched"] and said["heavy"] == [] and said["refused"]
    assert (
        "51,680 parameters in 39 tensors" in said["table"] and said["made"] == "cpu" and said["result"] == "TrainResult"
    )


def test_an_import_needs_not_even_torch() -> None:
    """So it takes some hundredths of a second, where torch takes seconds."""
    code = "import sys; import swift_mega.api; print(*sorted({'torch', 'numpy', 'megatron'} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.stdout.strip(), ran.stderr) == ("", "")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_the_device_comes_first(file: Path) -> None:
    """A module that is imported alone sets the device up before anything imports Megatron: its first import of ours is of this folder."""
    if file.name in LIGHT:
        return
    ours = [
        node.module
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("swift_mega")
        and node.module != "swift_mega.api.candidate"
    ]
    assert ours[0] in {
        f"swift_mega.api.{other.stem}" for other in FOLDER.glob("*.py") if other.name not in LIGHT - {"ready.py"}
    }


def test_every_name_is_there() -> None:
    for name in api.__all__:
        assert getattr(api, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        api.trian  # noqa: B018
