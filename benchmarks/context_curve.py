"""Loss curves of SmolLM2-135M on several context ranks, compared with one rank: `python benchmarks/context_curve.py [--help]`.

Full fine-tuning in float32 on packed rows, with the same data and seed; the numbers of ranks in `--ranks` run one after another by the
`swift-mega` command. SmolLM2 has 9 query heads and 3 key heads, which cannot be divided by 2 or 4. Prints the largest difference of the
loss in any step; exit status 1 where it is above `--tolerance`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def train(model: Path, ranks: int, steps: int, length: int, output: Path) -> list[float]:
    """Trains on `ranks` context ranks; returns the loss of each step."""
    settings = {
        "model": model,
        "dataset": ROOT / "examples" / "data" / "self_cognition.jsonl",
        "model_name": "Mega",
        "model_author": "the swift_mega team",
        "packing": "true",
        "max_length": length,
        "global_batch_size": 1,
        "train_iters": steps,
        "lr": 1e-5,
        "tuner_type": "full",
        "nproc": ranks,
        "context_parallel_size": ranks,
        "output_dir": output,
        "add_version": "false",
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "swift_mega", "sft", *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"training on {ranks} ranks ended with status {done.returncode}")
    lines = map(json.loads, (output / "logging.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "grad_norm" in line]


def plot(curves: dict[int, list[float]], file: Path) -> None:
    """Plots the curves, and the difference of each from the curve of one rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    first = next(iter(curves.values()))
    for ranks, losses in curves.items():
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, label=f"CP {ranks}", linestyle="-" if losses is first else "--")
        if losses is not first:
            right.semilogy(
                steps, [max(abs(a - b), 1e-9) for a, b in zip(losses, first, strict=True)], label=f"CP {ranks}"
            )
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel="difference from the first curve")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, made from its package")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="context ranks (default 1 2 4)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a packed row (default 512)")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--plot", type=Path, help="draws the curves to this file")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="two steps of a tiny random model on 1 and 2 ranks, to see that all of it runs",
    )
    arguments = parser.parse_args(given)
    sys.path.insert(0, str(ROOT / "scripts"))
    with tempfile.TemporaryDirectory(prefix="swift-mega-curve-") as scratch:
        model = arguments.model
        if arguments.smoke:
            from smoke_model import smoke_model

            model, arguments.ranks, arguments.steps = smoke_model(Path(scratch)), [1, 2], 2
            arguments.plot = Path(scratch) / "curves.png"
        elif model is None:
            from prepare_smollm2 import prepare

            model = prepare()
        curves = {
            ranks: train(model, ranks, arguments.steps, arguments.max_length, Path(scratch) / str(ranks))
            for ranks in arguments.ranks
        }
        if arguments.plot:
            plot(curves, arguments.plot)
    first, status = curves[arguments.ranks[0]], 0
    assert all(len(losses) == arguments.steps and all(map(math.isfinite, losses)) for losses in curves.values()), curves
    print(f"CP {arguments.ranks[0]}: loss {first[0]:.4f} -> {first[-1]:.4f} in {len(first)} steps")
    for ranks, losses in curves.items():
        far = max(abs(a - b) for a, b in zip(losses, first, strict=True))
        print(
            f"CP {ranks}: largest difference {far:.2e}{'' if far <= arguments.tolerance else '  beyond the tolerance'}"
        )
        status |= far > arguments.tolerance
    return status


if __name__ == "__main__":
    sys.exit(main())
