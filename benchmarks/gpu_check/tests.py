"""`pytest -m gpu` in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.record import Stage

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu")
"""The folder is given, because other tests import packages that are not needed on a machine for GPU checks."""


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage. Without a GPU it runs no test: `make test` runs the same test bodies on the CPU."""
    if not bench.on_gpu:
        stage.fact("pytest -m gpu", "needs a GPU; the same bodies run on the CPU in `make test`")
        return
    bench.free()
    done = subprocess.run(
        [sys.executable, *COMMAND],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print(*lines[-60:], done.stderr, sep="\n", flush=True)
    stage.fact("pytest -m gpu", lines[-1] if lines else "nothing was printed")
    stage.check("status", done.returncode, 0)
