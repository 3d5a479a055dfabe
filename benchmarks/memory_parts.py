"""Parts (a) and (e) of benchmarks/long_context.py: the measured memory of a layer, and the formula applied to an 8B model.

Each point of (a) runs in its own process: one Llama layer with embedding and head on one rank, one thread, float32. Its packed row has
examples of EXAMPLE tokens, so time is linear in the length of the row. First a short row and its optimizer step allocate everything that
stays in memory. Then one forward and backward pass of the whole row is measured: memory is VmHWM minus the resident memory before it.
glibc has to return large blocks to the system at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_); otherwise freed memory counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

EXAMPLE, VOCABULARY = 1024, 16384
SIZES = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
)
LENGTHS = (4096, 8192, 16384, 32768, 65536)
GIVEN = 2 * 10**9
"""Memory in bytes for which the longest row is computed."""
LEAVE_OUT = 4 * 10**9
"""Points that need more bytes than this are not run."""
TRAIN: dict[str, dict[str, Any]] = {
    "logits at once": {"recompute": "full", "loss_chunk_size": 1 << 30},
    "+ chunked loss": {"recompute": "full"},
    "+ tile_mlp": {"recompute": "full", "tile_mlp": True},
}
WORK = "memory-work"


@dataclass(frozen=True)
class Point:
    """One measurement of (a), and the value of the formula."""

    choice: str
    tokens: int
    formula: int
    peak: int
    seconds: float

    @property
    def off(self) -> float:
        return self.formula / self.peak - 1


def work(choice: str, tokens: str, folder: str) -> None:
    """The body of a point's process."""
    from swift_mega.device import device as devices

    device = devices.setup()
    import numpy as np
    import torch
    import torch.distributed as dist

    from swift_mega.data.pack import Example, collate
    from swift_mega.parallel import groups
    from swift_mega.train.build import layout_of
    from swift_mega.train.step import run_schedule, train_step
    from swift_mega.train.wire import build_training

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run = _run(choice, folder)
    training = build_training(run, device, groups.init(layout_of(run, 1)), steps=10)
    draw = np.random.default_rng(0)

    def row(count: int) -> Any:
        examples = [draw.integers(0, VOCABULARY, EXAMPLE, dtype=np.int32) for _ in range(count)]
        return collate([Example(tokens=each, trained=np.ones(EXAMPLE, bool)) for each in examples])

    train_step(training, [row(1)])
    batch = [row(int(tokens) // EXAMPLE)]
    Path("/proc/self/clear_refs").write_text("5")
    floor, begin = _status("VmRSS"), time.perf_counter()
    run_schedule(training, batch, forward_only=False)
    print(json.dumps({"peak": _status("VmHWM") - floor, "seconds": time.perf_counter() - begin}))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _run(choice: str, folder: str) -> Any:
    from swift_mega.config import schema

    return schema.Run(
        model=schema.Model(path=folder, dtype="float32"),
        tuner=schema.Full(),
        train=schema.Train(**TRAIN[choice]),
    )


def _formula(choice: str, folder: str) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Two functions: tokens -> bytes without weights, gradients and optimizer state; and such bytes -> the largest number of tokens."""
    from swift_mega.config import schema
    from swift_mega.memory.choices import choices_of
    from swift_mega.memory.memory import longest, memory
    from swift_mega.models.translate import load_settings
    from swift_mega.parallel.layout import plan_layout

    settings = load_settings(folder)
    layout = plan_layout(schema.Parallel(), settings.shape, 1)
    choices = choices_of(_run(choice, folder), hidden=SIZES["hidden_size"], device="cpu", longest=EXAMPLE)
    first = memory(settings, layout, choices, EXAMPLE)
    static = first.weights + first.gradients + first.optimizer

    def needed(tokens: int) -> int:
        return memory(settings, layout, choices, tokens).total - static

    def most(given: int) -> int:
        return longest(settings, layout, choices, device_bytes=given + static) // EXAMPLE * EXAMPLE

    return needed, most


def measure(
    say: Callable[[str], None],
    *,
    choices: Sequence[str] = tuple(TRAIN),
    lengths: Sequence[int] = LENGTHS,
    given: int = GIVEN,
) -> dict[str, Any]:
    """Runs part (a)."""
    from swift_mega.device import device as devices

    devices.setup()
    points, at_most = [], []
    with tempfile.TemporaryDirectory(prefix="swift-mega-memory-") as folder:
        _make_model(folder)
        for choice in choices:
            needed, most = _formula(choice, folder)
            fitting = most(given)
            at_most.append(point(choice, fitting, needed(fitting), folder))
            say(
                f"{choice:15} {fitting:6} tokens fit {given / 1e9:g} GB by the formula; measured {at_most[-1].peak / 1e9:.3f} GB"
            )
            for tokens in lengths:
                if needed(tokens) > LEAVE_OUT:
                    say(f"{choice:15} {tokens:6} tokens need {needed(tokens) / 1e9:.1f} GB by the formula: not run")
                    continue
                points.append(point(choice, tokens, needed(tokens), folder))
                say(f"{choice:15} {tokens:6} tokens {points[-1].peak / 1e9:6.3f} GB, formula {points[-1].off:+.1%}")
    return {"points": [asdict(one) for one in points], "longest": [asdict(one) for one in at_most]}


def point(choice: str, tokens: int, formula: int, folder: str) -> Point:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, WORK, choice, str(tokens), folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{choice}, {tokens} tokens failed:\n{done.stderr}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Point(choice, tokens, formula, said["peak"], said["seconds"])


def _make_model(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY, tie_word_embeddings=False)).save_pretrained(folder)


def fit(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """Linear fit: (bytes per token, bytes at 0 tokens, R², largest relative distance of a point from the line)."""
    xs, ys = [one.tokens for one in points], [one.peak for one in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    rest = [b - (y + slope * (a - x)) for a, b in zip(xs, ys, strict=True)]
    missed = sum(r * r for r in rest) / sum((b - y) ** 2 for b in ys)
    return slope, y - slope * x, 1 - missed, max(abs(r) / b for r, b in zip(rest, ys, strict=True))


def table(found: dict[str, Any]) -> str:
    """The results of (a) as Markdown."""
    points = [Point(**one) for one in found["points"]]
    lines = ["| | tokens | peak, GB | formula | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.choice} | {one.tokens:,} | {one.peak / 1e9:.3f} | {one.off:+.1%} | {one.seconds:.1f} |"
        for one in points
    ]
    lines += [
        "",
        "| | bytes per token | at none, MB | R² | largest distance from the line | longest in 2 GB, by the formula | measured there, GB |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for most in (Point(**one) for one in found["longest"]):
        slope, none, square, far = fit([one for one in points if one.choice == most.choice])
        lines.append(
            f"| {most.choice} | {slope:,.0f} | {none / 1e6:.1f} | {square:.6f} | {far:.1%} | {most.tokens:,} | {most.peak / 1e9:.3f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ (e)

H100 = int((79.6 - 4) * 2**30)
"""79.6 GiB minus 4 GiB for CUDA's context, NCCL's buffers, workspaces of libraries and fragmentation. Estimated without a GPU."""
HOST = 1.9e12
"""Host memory in bytes of a node with 8 GPUs, as in arXiv:2506.13996."""
PUBLISHED = {1: 0.5e6, 8: 3.7e6, 32: 15e6}


def ladder() -> list[tuple[str, Any]]:
    """(name, choices) of techniques; each adds one technique to those before it."""
    from swift_mega.memory.choices import Choices

    steps: list[tuple[str, Any]] = [("bfloat16, FlashAttention, context parallelism", Choices(whole_loss=True))]
    for name, change in (
        ("+ recompute full", {"recompute": "full"}), ("+ optimizer_cpu_offload", {"offload_fraction": 1.0}),
        ("+ loss_chunk_size", {"whole_loss": False}), ("+ tile_mlp", {"tile": 4096}),
        ("+ offload_activations", {"offload_activations": True}), ("+ gradients in bfloat16", {"gradients_in_float32": False}),
    ):  # fmt: skip
        steps.append((name, replace(steps[-1][1], **change)))
    return steps


def plan() -> dict[str, Any]:
    """Runs part (e): for each technique and number of GPUs, (tokens, layout)."""
    from swift_mega.device import device as devices

    devices.setup()
    from swift_mega.memory.published import llama_3_1_8b

    settings, steps = llama_3_1_8b(), ladder()
    best = steps[-1][1]
    rows: dict[str, dict[int, tuple[int, str]]] = {
        name: {ranks: _best(settings, choices, ranks, sharded=False) for ranks in PUBLISHED} for name, choices in steps
    }
    numbers = 8_030_261_248
    rows["+ the best tensor, pipeline and context sizes"] = {
        n: _best(settings, best, n, sharded=True) for n in PUBLISHED
    }
    rows["not implemented: gradients in host memory"] = {
        n: _best(settings, best, n, sharded=True, spare=2 * numbers) for n in PUBLISHED
    }
    rows["not implemented: weights and gradients in host memory"] = {
        n: _best(settings, best, n, sharded=True, spare=4 * numbers) for n in PUBLISHED
    }
    rows["LoRA of rank 8 with all of the settings above"] = {
        n: _best(settings, replace(best, rank=8), n, sharded=True) for n in PUBLISHED
    }
    return {"rows": rows, "published": PUBLISHED}


def _best(settings: Any, choices: Any, ranks: int, *, sharded: bool, spare: int = 0) -> tuple[int, str]:
    """The longest row over all layouts with one data rank, and its layout.

    sharded: also layouts that shard weights. spare: bytes of the model that are not on the device.
    """
    from swift_mega.config.schema import Parallel
    from swift_mega.errors import UserError
    from swift_mega.memory.memory import longest
    from swift_mega.parallel.layout import plan_layout

    found, sizes = [(0, "-")], (1, 2, 4, 8) if sharded else (1,)
    host = int(HOST if ranks == 1 else HOST / 8)
    for tensor in sizes:
        for pipeline in (size for size in sizes if ranks % (tensor * size) == 0):
            context = ranks // tensor // pipeline
            for kind in ("auto", "ring", "ulysses") if context > 1 else ("auto",):
                asked = Parallel(tensor=tensor, pipeline=pipeline, context=context, cp=kind, sequence=tensor > 1)  # type: ignore[arg-type]
                try:
                    layout = plan_layout(asked, settings.shape, ranks)
                except UserError:
                    continue
                device = H100 + spare // (tensor * pipeline)
                found.append((longest(settings, layout, choices, device_bytes=device, host_bytes=host), layout.name))
    return max(found, key=lambda one: one[0])


def plan_table(found: dict[str, Any]) -> str:
    """The results of (e) as Markdown."""
    published: dict[Any, float] = found["published"]
    lines = [
        f"| | {' | '.join(f'{n} GPU{chr(115) * (int(n) > 1)}' for n in published)} |",
        "|---|" + "---|" * len(published),
    ]
    for name, row in found["rows"].items():
        cells = [f"{tokens / 1e6:.2f}M ({layout})" if tokens else "does not fit" for tokens, layout in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"| published, arXiv:2506.13996 | {' | '.join(f'{tokens / 1e6:.1f}M' for tokens in published.values())} |"
    )
    return "\n".join(lines)


def draw(found: dict[str, Any], file: Path) -> None:
    """Plots (a) on the left and (e) on the right; one of them may be missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    points = [Point(**one) for one in found.get("a", {}).get("points", [])]
    for choice in dict.fromkeys(one.choice for one in points):
        some = [one for one in points if one.choice == choice]
        (line,) = left.plot([one.tokens for one in some], [one.peak / 1e9 for one in some], "o", label=choice)
        left.plot(
            [one.tokens for one in some], [one.formula / 1e9 for one in some], "-", color=line.get_color(), linewidth=1
        )
    left.set(xlabel="tokens of a rank", ylabel="GB", title="one layer on the CPU: measured (dots) and formula (lines)")
    if points:
        left.legend(fontsize=8)
    if "e" in found:
        rows = found["e"]["rows"]
        names = list(rows)
        for number, ranks in enumerate(found["e"]["published"]):
            values = [list(rows[name].values())[number][0] / 1e6 for name in names]
            bars = right.barh([y + 0.27 * (number - 1) for y in range(len(names))], values, 0.25, label=f"{ranks} GPUs")
            right.axvline(found["e"]["published"][ranks] / 1e6, color=bars[0].get_facecolor(), linestyle=":")
        right.set_yticks(range(len(names)), names, fontsize=7)
        right.invert_yaxis()
        right.set_xscale("log")
        right.set(xlabel="million tokens (dotted: published)", title="Llama 3.1 8B on H100 80 GB, by the formula")
        right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] != [WORK]:
        raise SystemExit("run benchmarks/long_context.py --parts a e")
    work(*sys.argv[2:])
