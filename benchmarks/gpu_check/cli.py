"""`swift-mega verify` as a user starts it: this interpreter starts another, and that starts its rank afresh."""

import subprocess
import sys

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.record import Stage

FLOAT32 = ("--torch_dtype", "float32", "--tolerance", "1e-3")
COMMANDS = (("--torch_dtype", "float64"), FLOAT32, (*FLOAT32, "--tuner", "lora"))
SMALL = COMMANDS[-1:]
"""A CPU runs the same layouts in `make test`; here it shows that the command line is called rightly."""


def run(bench: Bench, stage: Stage) -> None:
    """The stage."""
    model = bench.model("tiny")
    for words in SMALL if bench.small else COMMANDS:
        command = [sys.executable, "-m", "swift_mega", "verify", "--model", str(model), "--layouts", "single", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        said = f"{done.stderr}\n{done.stdout}".strip().splitlines()
        stage.fact(" ".join(words), said[-1] if said else "nothing was printed")
        stage.check(f"verify {' '.join(words)}: status", done.returncode, 0)
        if done.returncode:
            print(*said[-30:], sep="\n", flush=True)
