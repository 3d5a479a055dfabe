"""Transformer Engine in a process of its own, where it was built. It must not be on the path of other tests, which run without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "transformer-engine"
"""Where `make test-newest` puts it (scripts/build_te.py), outside the path of every other test."""
NOT_BUILT = "Transformer Engine is not built; make test-newest does, with nvcc"


def found_by(program: str, work: Path) -> dict[str, Any]:
    """What tests/models/`program`.py writes to found.json in `work`. Its output is printed where it fails."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", FOLDER)))
    command = [sys.executable, "-m", f"tests.models.{program}", str(work)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((work / "found.json").read_text())  # type: ignore[no-any-return]
