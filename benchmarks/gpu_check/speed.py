"""LoRA steps compared with transformers + PEFT on the same device, and a profile of ours.

Both train the same adapter on all linear layers, from the same values, with AdamW and clipping; loss and gradient norm must agree.
Theirs runs as transformers' Trainer does: SDPA attention, fused AdamW, examples padded to the longest. Padding does not count as tokens.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.bench import OPTIM, Bench, computed_by, examples, network, packed, run_of
from benchmarks.gpu_check.lora import random_adapter
from benchmarks.gpu_check.record import Stage
from swift_mega.data.pack import Microbatch
from swift_mega.train.flops import flops_per_token
from swift_mega.train.step import train_step
from swift_mega.train.wire import Training

LIMITS = {"bfloat16": (1e-2, 5e-2), "float32": (1e-4, 1e-3)}
"""Limits for the first step: (relative difference of the loss, of the gradient norm)."""
SLOWEST = 1.0
"""Limit of our seconds / their seconds on a GPU; `make benchmark` measures the CPU."""
PLACES, KERNELS = 12, 15
Rows = Sequence[Microbatch]
StepFunction = Callable[[Rows], tuple[float, float]]
"""Runs an optimizer step; returns (loss, gradient norm)."""


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    size = bench.size("1b")
    scenes = _scenes(bench, size)
    model, adapter = bench.model(size), random_adapter(bench, size)
    first: dict[str, list[tuple[float, float]]] = {name: [] for name in scenes}
    seconds: dict[str, list[float]] = {name: [] for name in scenes}

    def time_all(step: StepFunction) -> None:
        for name, rows in scenes.items():
            first[name].append(step(rows))
            if bench.on_gpu:
                seconds[name].append(bench.seconds(partial(step, rows)))

    with bench.training(run_of(model, bench.dtype, "lora", adapter=adapter, optim=OPTIM)) as training:
        stage.fact("ours computed by", computed_by(training))
        time_all(lambda rows: _ours(training, rows))
        work, peak = flops_per_token(training.part.settings, trained=False), bench.device.peak_flops()
        if bench.on_gpu:
            _waits(stage, training, list(scenes.values())[-1])
            _kernels(stage, training, next(iter(scenes.values())))
    time_all(_theirs(bench, model, adapter))
    bench.free()
    for name, rows in scenes.items():
        (loss, norm), (their_loss, their_norm) = first[name]
        limits = LIMITS[bench.dtype]
        stage.check(f"{name}: loss of the first step, difference", abs(loss - their_loss), limits[0])
        stage.check(f"{name}: its gradient norm, relative", abs(norm / their_norm - 1), limits[1])
        if bench.on_gpu:
            tokens = sum(int(row.lengths.sum()) for row in rows)
            ours, theirs = (tokens / each for each in seconds[name])
            share = f"{ours * work / peak:.3f}" if peak else "unknown for this GPU"
            stage.fact(f"{name}: tokens/s (MFU), theirs", f"{ours:.0f} ({share}), {theirs:.0f}")
            stage.check(f"{name}: our seconds / theirs", theirs / ours, SLOWEST)


def _scenes(bench: Bench, size: str) -> dict[str, list[Microbatch]]:
    """Name -> two packed rows, whose gradients are accumulated."""
    vocab = bench.vocab(size)
    if bench.small:
        return {"2 x 64": [packed((64, 64), vocab, seed) for seed in range(2)]}

    def mixed(seed: int) -> list[int]:
        lengths = np.random.default_rng(seed).lognormal(5.5, 0.6, 24)
        return [int(length) for length in lengths.clip(20, 2000)]

    return {
        "1 x 8192": [packed((8192,), vocab, seed) for seed in range(2)],
        "4 x 2048": [packed((2048,) * 4, vocab, seed) for seed in range(2)],
        "packed, mean 300": [packed(mixed(seed), vocab, seed) for seed in range(2)],
    }


def _ours(training: Training, rows: Rows) -> tuple[float, float]:
    result = train_step(training, rows)
    return result.loss, result.grad_norm or 0.0


def _theirs(bench: Bench, model: Path, adapter: Path) -> StepFunction:
    net = network(bench, model, getattr(torch, bench.dtype), adapter, trainable=True).train()
    parameters = [x for x in net.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )

    def step(rows: Rows) -> tuple[float, float]:
        targets, total = sum(row.targets for row in rows), 0.0
        for row in rows:
            loss = net(**_padded(row, bench.device.device), num_items_in_batch=targets, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return total, float(norm)

    return step


def _padded(row: Microbatch, device: torch.device) -> dict[str, Any]:
    """Inputs of transformers: [examples, longest], with a mask only where there is padding."""
    tokens = examples(row)
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tokens], batch_first=True)
    found = {"input_ids": ids, "labels": ids.masked_fill(real == 0, -100)} | (
        {} if bool(real.all()) else {"attention_mask": real}
    )
    return {name: x.to(device) for name, x in found.items()}


def _waits(stage: Stage, training: Training, rows: Rows) -> None:
    """Records how often the host waits for the GPU in a step, and the places in the code."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            train_step(training, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in heard if "synchroniz" in str(one.message)
    )
    stage.fact("waits for the GPU in a step", sum(places.values()))
    for place, count in places.most_common(PLACES):
        stage.fact(f"waits at {place}", count)


def _kernels(stage: Stage, training: Training, rows: Rows) -> None:
    """Records the kernels that take most of the time of a step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        train_step(training, rows)
        torch.cuda.synchronize()
    # Only device events: events of operators include the time of their kernels again.
    kernels = [each for each in profile.key_averages() if each.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(each.self_device_time_total for each in kernels)
    for each in sorted(kernels, key=lambda one: -one.self_device_time_total)[:KERNELS]:
        share = 100 * each.self_device_time_total / max(total, 1)
        stage.fact(f"kernel {each.key[:56]}", f"{share:.1f} %, {each.count} calls")
