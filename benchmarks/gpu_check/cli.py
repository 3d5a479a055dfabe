"""The command line as a user runs it: this interpreter starts `swift-mega`, which starts its rank as a new process."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.record import Stage

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = ("--torch_dtype", "float32", "--tolerance", "1e-3")
COMMANDS = (("--torch_dtype", "float64"), FLOAT32, (*FLOAT32, "--tuner", "lora"))
SMALL = COMMANDS[-1:]
"""`make test` tests the same layouts on the CPU; here this only shows that the command line is called with valid arguments."""
TRAINED = (
    "--global_batch_size", "4", "--train_iters", "3", "--lora_dropout", "0.3", "--deterministic", "true", "--add_version", "false",
)  # fmt: skip


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    model = bench.model("tiny")
    for words in SMALL if bench.small else COMMANDS:
        status, last = swift_mega("verify", "--model", str(model), "--layouts", "single", *words)
        stage.fact(" ".join(words), last)
        stage.check(f"verify {' '.join(words)}: status", status, 0)
    if not bench.small:
        repeated(bench, stage)


def swift_mega(*words: str) -> tuple[int, str]:
    """(exit status, last line of the output); the whole output is printed where the command failed."""
    done = subprocess.run(
        [sys.executable, "-m", "swift_mega", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    said = f"{done.stderr}\n{done.stdout}".strip().splitlines()
    if done.returncode:
        print(*said[-30:], sep="\n", flush=True)
    return done.returncode, said[-1] if said else "nothing was printed"


def repeated(bench: Bench, stage: Stage) -> None:
    """Checks that two deterministic LoRA runs with dropout write bit-identical adapters."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from smoke_model import smoke_model

    folder = bench.folder / "repeated"
    folder.mkdir()
    model, rows = smoke_model(folder), folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"query": f"{n}?", "response": f"{n}."}) for n in range(8)) + "\n")
    written = []
    for name in ("one", "other"):
        output = folder / name
        words = ("sft", "--model", str(model), "--dataset", str(rows), "--output_dir", str(output), *TRAINED)
        status, _ = swift_mega(*words)
        stage.check(f"sft {' '.join(TRAINED)}, {name} run: status", status, 0)
        written.append([path.read_bytes() for path in sorted(output.rglob("adapter_model.safetensors"))])
    stage.check("bytes of the two adapters are the same (0)", int(not written[0] or written[0] != written[1]), 0)
