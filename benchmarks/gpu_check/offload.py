"""Offloading to host memory and computation in tiles do not change results: loss and gradients with and without them are compared."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.bench import OPTIM, Bench, packed, relative, run_of
from benchmarks.gpu_check.record import Stage
from swift_mega.data.pack import Microbatch
from swift_mega.train.step import run_schedule, train_step

LOSS_LIMIT, TILED_LIMIT = 1e-6, 1e-4
GRADIENT_LIMITS = {"bfloat16": 1e-2, "float32": 1e-5}
STEP_LIMITS = {"bfloat16": 1e-2, "float32": 1e-5}
"""Limits for the loss after a step with AdamW on the host, which rounds differently from AdamW on the GPU."""
CASES: dict[str, dict[str, Any]] = {
    "layer inputs on the host": {"offload_activations": True},
    "MLPs by tiles": {"tile_mlp": True},
}


@dataclass(frozen=True)
class Result:
    """The result of one forward and backward pass."""

    loss: float
    gradients: Tensor
    seconds: float
    peak: int
    """Peak allocated bytes; 0 on the CPU."""


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    size = bench.size("smol")
    lengths = (40, 9) if bench.small else (900, 300, 848)
    batch = [packed(lengths, bench.vocab(size), seed) for seed in range(2)]
    plain = once(bench, size, batch)
    for name, settings in CASES.items():
        # Rows of a small run are shorter than the default tile.
        train = settings | ({"mlp_tile_size": 16} if bench.small and "tile_mlp" in settings else {})
        found = once(bench, size, batch, **train)
        stage.check(
            f"{name}: loss, difference",
            abs(found.loss - plain.loss),
            TILED_LIMIT if "tile_mlp" in train else LOSS_LIMIT,
        )
        stage.check(
            f"{name}: gradients, relative", relative(found.gradients, plain.gradients), GRADIENT_LIMITS[bench.dtype]
        )
        stage.fact(
            f"{name}: seconds, peak (without)",
            f"{found.seconds:.3f}, {found.peak / 2**20:.0f} MiB ({plain.seconds:.3f}, {plain.peak / 2**20:.0f} MiB)",
        )
    ours, theirs = (after_a_step(bench, size, batch, offload=offload) for offload in (True, False))
    stage.check(
        "AdamW's state on the host: loss after a step, difference", abs(ours - theirs), STEP_LIMITS[bench.dtype]
    )


def once(bench: Bench, size: str, batch: Sequence[Microbatch], **train: Any) -> Result:
    """Runs a pass with all layers recomputed: first timed, then again for loss and gradients."""
    with bench.training(run_of(bench.model(size), bench.dtype, "full", recompute="full", **train)) as training:

        def one_pass() -> float:
            for chunk in training.chunks:
                chunk.zero_grad_buffer()
            return run_schedule(training, batch, forward_only=False).loss

        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.seconds(one_pass, times=3 if bench.on_gpu else 1, warm=int(bench.on_gpu))
        loss = one_pass()
        bench.synchronize()
        gradients = torch.cat(
            [main_grad(named.parameter).flatten().cpu() for named in training.part.named_parameters()]
        )
        return Result(loss, gradients, seconds, torch.cuda.max_memory_allocated() if bench.on_gpu else 0)


def main_grad(parameter: nn.Parameter) -> Tensor:
    """The buffer in which Megatron's DistributedDataParallel sums the gradient of a parameter."""
    return parameter.main_grad  # type: ignore[attr-defined,no-any-return]


def after_a_step(bench: Bench, size: str, batch: Sequence[Microbatch], *, offload: bool) -> float:
    """The loss of the second step."""
    optim = dataclasses.replace(OPTIM, cpu_offload=offload)
    with bench.training(run_of(bench.model(size), bench.dtype, "full", optim=optim)) as training:
        train_step(training, batch)
        return train_step(training, batch).loss
