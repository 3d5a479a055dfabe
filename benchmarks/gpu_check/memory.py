"""Peak allocated bytes of a training step, compared with the memory estimate of `swift-mega plan`."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_check.bench import Bench, packed, run_of
from benchmarks.gpu_check.record import Stage
from swift_mega.config import schema
from swift_mega.memory.choices import choices_of
from swift_mega.memory.live import LiveBytes
from swift_mega.memory.memory import Memory, memory
from swift_mega.models.translate import load_settings
from swift_mega.train.build import layout_of
from swift_mega.train.step import train_step

LIMIT = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A step on one packed row with one example."""

    tuner: str
    tokens: int
    train: dict[str, Any] = field(default_factory=dict)


CASES = {
    "LoRA, 8k tokens": Case("lora", 8192),
    "LoRA, 32k tokens, recomputed": Case("lora", 32768, {"recompute": "full"}),
    "full, 8k tokens, recomputed, tiled": Case("full", 8192, {"recompute": "full", "tile_mlp": True}),
}
SMALL = {"LoRA, 512 tokens": Case("lora", 512), "full, 512 tokens": Case("full", 512, {"recompute": "full"})}


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    size = bench.size("1b")
    for name, case in (SMALL if bench.small else CASES).items():
        run = run_of(bench.model(size), bench.dtype, case.tuner, **case.train)
        said = formula(bench, run, case.tokens)
        allocated, reserved = measured(bench, run, size, case.tokens)
        at = f"at the {said.moment}'s" if said.moment else "at its"
        stage.fact(
            f"{name}: allocated, reserved, by formula {at} peak",
            f"{allocated / GIB:.3g}, {reserved / GIB:.3g}, {said.total / GIB:.3g} GiB",
        )
        stage.check(f"{name}: |formula / allocated - 1|", abs(said.total / allocated - 1), LIMIT)


def formula(bench: Bench, run: schema.Run, tokens: int) -> Memory:
    assert run.model.path is not None
    settings = load_settings(run.model.path)
    choices = choices_of(run, hidden=settings.shape.hidden, device=bench.device.kind, longest=tokens)
    return memory(settings, layout_of(run, 1), choices, tokens)


def measured(bench: Bench, run: schema.Run, size: str, tokens: int) -> tuple[int, int]:
    """(peak allocated bytes, peak reserved bytes) of a step after the first one; on the CPU both are the bytes of all tensors."""
    row = packed((tokens,), bench.vocab(size))
    bench.free()
    before = torch.cuda.memory_allocated() if bench.on_gpu else 0
    live = LiveBytes()
    with contextlib.nullcontext() if bench.on_gpu else live, bench.training(run) as training:
        train_step(training, [row])
        if bench.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        live.peak = 0
        train_step(training, [row])
        if not bench.on_gpu:
            return live.peak, live.peak
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
