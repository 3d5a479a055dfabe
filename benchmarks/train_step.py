"""Tokens per second of LoRA fine-tuning, ours and with transformers + PEFT: `python benchmarks/train_step.py [--help]`.

Each side is a server process that runs one optimizer step on request. Steps alternate (ours, theirs, theirs, ours, ...), so other load on
the machine affects both sides. The ratio is the median over pairs of consecutive steps, in wall time and in CPU time.

Both train the same adapter (rank 8 on all seven linear layers) in float32 with AdamW and clipping, on the same tokens with the same number
of threads. Loss and gradient norm must agree before steps are timed:
  unpacked  examples of equal length, one by one, gradients accumulated
  mixed     batches of 8 examples of mixed length: theirs padded to the longest, with a mask; ours packed
Padding does not count as tokens. Theirs runs as transformers' Trainer does: SDPA attention, fused AdamW, the loss divided by the number of
items in the batch.
"""

import argparse
import atexit
import json
import math
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANK, RATE, CLIP, DECAY, BETAS, EPS = 8, 1e-4, 1.0, 0.01, (0.9, 0.95), 1e-8
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Batch:
    """The examples of one optimizer step. together: one forward pass for all examples, padded or packed; else one pass per example."""

    examples: list[list[int]]
    trained: list[list[bool]]
    together: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))


@dataclass(frozen=True)
class Step:
    """The answer of a server. wall: seconds. cpu: CPU seconds of all threads. peak: peak resident bytes since the begin of the scenario."""

    loss: float
    grad_norm: float
    wall: float
    cpu: float
    peak: int


# ------------------------------------------------------------------------------------------------ batches


def unpacked_batches(count: int, examples: int, length: int, vocabulary: int) -> list[Batch]:
    """Batches of random tokens; all tokens are trained."""
    draw = random.Random(1)
    rows = [[[draw.randrange(vocabulary) for _ in range(length)] for _ in range(examples)] for _ in range(count)]
    return [Batch(examples, [[True] * length for _ in examples], together=False) for examples in rows]


def mixed_batches(count: int, vocabulary: int) -> list[Batch]:
    """Batches of eight examples with log-normal lengths around 70 tokens, limited to 20 … 512, similar to instruction data."""
    draw = random.Random(2)
    batches = []
    for _ in range(count):
        lengths = [min(512, max(20, round(draw.lognormvariate(4.25, 0.8)))) for _ in range(8)]
        rows = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
        batches.append(Batch(rows, [[True] * len(row) for row in rows], together=True))
    return batches


def file_batches(count: int, model: Path, dataset: str) -> list[Batch]:
    """Batches of eight conversations from a file in one of SWIFT's formats; only the replies are trained."""
    from swift_mega.config import schema
    from swift_mega.data.chat import load_tokenizer
    from swift_mega.data.loader import prepare

    settings = schema.Data(dataset=(dataset,), model_name="Mega", model_author="the authors")
    found = prepare(settings, load_tokenizer(str(model))).train
    order = random.Random(3).sample(range(len(found)), 8 * count)
    chosen = [[found[index] for index in order[8 * number : 8 * number + 8]] for number in range(count)]
    return [
        Batch([each.tokens.tolist() for each in batch], [each.trained.tolist() for each in batch], together=True)
        for batch in chosen
    ]


# ------------------------------------------------------------------------------------------------ the two servers


StepFunction = Callable[[Batch], tuple[float, float]]
"""Runs an optimizer step; returns (loss, gradient norm)."""


def serve(
    build: Callable[[Path, Path], StepFunction], pipe: Connection, threads: int, model: Path, adapter: Path
) -> None:
    """Builds a side and sends "ready". Then answers each Batch with its Step; "peak" resets the peak memory, and None ends the server."""
    import torch

    torch.set_num_threads(threads)
    step = build(model, adapter)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        if command == "peak":
            _forget_peak()
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        loss, norm = step(command)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pipe.send(Step(loss, norm, wall, cpu, _peak()))


def ours(model: Path, adapter: Path) -> StepFunction:
    """The side of swift_mega, on one rank. Writes the adapter from which both sides start."""
    import numpy as np
    import torch

    from swift_mega.device import device as devices

    # Has to run before an import below imports Megatron.
    device = devices.setup()
    from swift_mega.config import schema
    from swift_mega.data.pack import Example, collate, pack_examples
    from swift_mega.export.checkpoint import save_checkpoint
    from swift_mega.parallel import groups
    from swift_mega.train.build import layout_of
    from swift_mega.train.step import train_step
    from swift_mega.train.wire import build_training

    run = schema.Run(
        model=schema.Model(path=str(model), dtype="float32"),
        tuner=schema.Lora(rank=RANK, alpha=2 * RANK),
        optim=schema.Optim(
            lr=RATE, schedule="constant", weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, clip_grad=CLIP
        ),
    )
    _one_rank()
    training = build_training(run, device, groups.init(layout_of(run, 1)), steps=10**6)
    # `up` starts at zero, and with zero a wrong `down` would not be noticed.
    with torch.no_grad():
        for named in training.tuner.exported(training.part):
            if ".adapter.up." in named.name:
                named.parameter.copy_(torch.randn(named.parameter.shape) * 0.02)
    save_checkpoint(
        training.tuner,
        training.part,
        training.groups,
        adapter,
        source=str(model),
        max_shard_size="5GB",
        dtype=torch.float32,
    )

    def step(batch: Batch) -> tuple[float, float]:
        rows = [[index] for index in range(len(batch.examples))]
        if batch.together:
            rows = pack_examples([len(tokens) for tokens in batch.examples], 1024)
        examples = [
            Example(tokens=np.asarray(tokens, dtype=np.int32), trained=np.asarray(trained))
            for tokens, trained in zip(batch.examples, batch.trained, strict=True)
        ]
        result = train_step(training, [collate([examples[index] for index in row]) for row in rows])
        return result.loss, result.grad_norm or 0.0

    return step


def _one_rank() -> None:
    """Initialises torch.distributed with this process as the only rank, until the process ends."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def theirs(model: Path, adapter: Path) -> StepFunction:
    """The side of transformers + PEFT; a step is as in transformers' Trainer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    network: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)

    def step(batch: Batch) -> tuple[float, float]:
        pairs = list(zip(batch.examples, batch.trained, strict=True))
        items = sum(sum(trained[1:]) for trained in batch.trained)
        total = 0.0
        for together in [pairs] if batch.together else [[pair] for pair in pairs]:
            loss = network(**padded(together), num_items_in_batch=items, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total, float(norm)

    return step


def padded(pairs: Sequence[tuple[list[int], list[bool]]]) -> dict[str, Any]:
    """Inputs of transformers, padded on the right to the longest example; without a mask where there is no padding."""
    import torch

    longest = max(len(tokens) for tokens, _ in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, trained) in enumerate(pairs):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.tensor(tokens).masked_fill(~torch.tensor(trained), -100)
    return {"input_ids": ids, "labels": labels} | ({} if bool(mask.all()) else {"attention_mask": mask})


def _forget_peak() -> None:
    """Resets the peak of resident memory, on Linux only; elsewhere the peak is of the whole process."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def _peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Result:
    """All timed steps of both sides in one scenario, in pairs."""

    scenario: str
    tokens: list[int]
    ours: list[Step]
    theirs: list[Step]
    loss_difference: float
    norm_difference: float
    """Both are the largest over all steps; this one is relative."""

    def ratio(self, kind: str) -> float:
        """Their seconds / our seconds; the median over pairs."""
        return statistics.median(
            getattr(b, kind) / getattr(a, kind) for a, b in zip(self.ours, self.theirs, strict=True)
        )

    def row(self, side: str) -> str:
        steps: list[Step] = getattr(self, side)
        speeds = [tokens / step.wall for tokens, step in zip(self.tokens, steps, strict=True)]
        cpu = statistics.median(tokens / step.cpu for tokens, step in zip(self.tokens, steps, strict=True))
        peak = max(step.peak for step in steps) / 2**30
        ratios = f"{self.ratio('wall'):6.2f}x {self.ratio('cpu'):6.2f}x" if side == "ours" else ""
        return (
            f"{self.scenario:10} {side:7} {statistics.median(speeds):9.1f} {min(speeds):7.1f} {max(speeds):7.1f} "
            f"{cpu:10.1f} {peak:8.2f}  {ratios}"
        )


class Sides:
    """The two servers."""

    def __init__(self, model: Path, adapter: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        # Ours first, because it writes the adapter.
        for build in (ours, theirs):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(build, there, threads, model, adapter), daemon=True)
            process.start()
            # Closed here, so that this end notices when the server dies.
            there.close()
            self.processes.append(process)
            self.pipes[build.__name__] = here
            assert here.recv() == "ready"

    def step(self, side: str, batch: Batch) -> Step:
        self.pipes[side].send(batch)
        return self.pipes[side].recv()

    def forget_peaks(self) -> None:
        for pipe in self.pipes.values():
            pipe.send("peak")

    def close(self) -> None:
        for pipe in self.pipes.values():
            pipe.send(None)
        for process in self.processes:
            process.join()


def measure(
    sides: Sides, scenario: str, batches: Sequence[Batch], seconds: float, log: Callable[[str], None]
) -> Result:
    """Runs one step of each side as warm-up and comparison, then pairs of steps for `seconds`, but at least three pairs."""
    sides.forget_peaks()
    first, second = sides.step("ours", batches[0]), sides.step("theirs", batches[0])
    differences, norms = [abs(first.loss - second.loss)], [abs(first.grad_norm / second.grad_norm - 1)]
    log(
        f"{scenario}: loss {first.loss:.6f} | {second.loss:.6f}, gradient norm {first.grad_norm:.6f} | {second.grad_norm:.6f}"
    )
    if not all(map(math.isfinite, differences + norms)) or max(differences + norms) > TOLERANCE:
        raise SystemExit(f"{scenario}: the two sides do not compute the same; nothing was timed")
    steps: dict[str, list[Step]] = {"ours": [], "theirs": []}
    tokens: list[int] = []
    until = time.monotonic() + seconds
    while len(tokens) < 3 or time.monotonic() < until:
        batch = batches[(len(tokens) + 1) % len(batches)]
        for side in ("ours", "theirs") if len(tokens) % 2 else ("theirs", "ours"):
            steps[side].append(sides.step(side, batch))
        tokens.append(batch.tokens)
        a, b = steps["ours"][-1], steps["theirs"][-1]
        differences.append(abs(a.loss - b.loss))
        norms.append(abs(a.grad_norm / b.grad_norm - 1))
        log(f"{scenario}: {batch.tokens} tokens, seconds {a.wall:.2f} | {b.wall:.2f}, of CPU {a.cpu:.2f} | {b.cpu:.2f}")
    return Result(scenario, tokens, steps["ours"], steps["theirs"], max(differences), max(norms))


def table(results: Sequence[Result], threads: int) -> str:
    """The table that is printed at the end."""
    lines = [
        f"LoRA rank {RANK} on all linears, float32, AdamW, {threads} thread(s); tokens/s of the median step, padding not counted",
        f"{'':10} {'':7} {'tokens/s':>9} {'min':>7} {'max':>7} {'per CPU-s':>10} {'peak GiB':>8}  {'wall':>7} {'CPU':>7}",
    ]
    for result in results:
        lines += [result.row("ours"), result.row("theirs")]
    worst = max(result.loss_difference for result in results), max(result.norm_difference for result in results)
    pairs = ", ".join(f"{len(result.tokens)} {result.scenario}" for result in results)
    lines.append(
        f"pairs of steps: {pairs}; over all of them losses differ by {worst[0]:.1e} at most, gradient norms by {worst[1]:.1e}"
    )
    return "\n".join(lines)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face directory; default: SmolLM2, prepared where it does not exist yet"
    )
    parser.add_argument(
        "--threads", type=int, help="threads of each side; default: torch's own choice, which OMP_NUM_THREADS sets"
    )
    parser.add_argument(
        "--scenario", choices=("unpacked", "mixed", "file"), action="append", help="default: unpacked and mixed"
    )
    parser.add_argument(
        "--data", help="JSONL for the scenario `file`: mixed lengths, loss on the assistant's turns only"
    )
    parser.add_argument(
        "--seconds", type=float, default=75, help="seconds per scenario (default 75); three pairs of steps at least"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of an unpacked example (default 256)")
    parser.add_argument("--examples", type=int, default=2, help="unpacked examples per step (default 2)")
    parser.add_argument("--json", type=Path, help="writes every step to this file")
    parser.add_argument(
        "--smoke", action="store_true", help="three pairs of steps on a tiny random model, to see that all of it runs"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = _arguments(given)
    if arguments.smoke:
        _smoke(arguments)
    scenarios = arguments.scenario or (["unpacked", "mixed"] + (["file"] if arguments.data else []))
    if "file" in scenarios and not arguments.data:
        raise SystemExit("--scenario file needs --data FILE.jsonl")
    model = arguments.model or _prepared()
    threads = arguments.threads or _default_threads()
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    make: dict[str, Callable[[], list[Batch]]] = {
        "unpacked": lambda: unpacked_batches(4, arguments.examples, arguments.length, vocabulary),
        "mixed": lambda: mixed_batches(6, vocabulary),
        "file": lambda: file_batches(6, model, arguments.data),
    }
    batches = {scenario: make[scenario]() for scenario in scenarios}
    with tempfile.TemporaryDirectory() as folder:
        print("starting both sides", file=sys.stderr)
        sides = Sides(model, Path(folder) / "adapter", threads)
        results = [measure(sides, name, batches[name], arguments.seconds, _say) for name in scenarios]
        sides.close()
    print(table(results, threads))
    if arguments.json:
        recorded = [asdict(r) | {"ratio_wall": r.ratio("wall"), "ratio_cpu": r.ratio("cpu")} for r in results]
        arguments.json.write_text(json.dumps({"threads": threads, "model": str(model), "results": recorded}, indent=1))


def _smoke(arguments: argparse.Namespace) -> None:
    """Runs every scenario in the smallest size; as in a long run, the two sides must agree, or nothing is printed."""
    folder = tempfile.mkdtemp(prefix="swift-mega-smoke-")
    atexit.register(shutil.rmtree, folder)
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from smoke_model import smoke_model

    arguments.model = smoke_model(Path(folder))
    arguments.data = str(Path(__file__).parent.parent / "examples" / "data" / "self_cognition.jsonl")
    arguments.seconds, arguments.length, arguments.threads = 0.0, 32, 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prepared() -> Path:
    """The directory of the cached SmolLM2 that scripts/prepare_smollm2.py makes."""
    import subprocess

    script = Path(__file__).parent.parent / "scripts" / "prepare_smollm2.py"
    return Path(
        subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    )


def _default_threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
