"""What waits in host memory, and what is computed by tiles, changes nothing: loss and gradients beside those without."""

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
"""Of the loss after a step with AdamW on the host, which rounds otherwise than the GPU's."""
CASES: dict[str, dict[str, Any]] = {
    "layer inputs on the host": {"offload_activations": True},
    "MLPs by tiles": {"tile_mlp": True},
}


@dataclass(frozen=True)
class Result:
    """One forward and backward pass."""

    loss: float
    gradients: Tensor
    seconds: float
    peak: int
    """Bytes allocated at most; 0 on the CPU."""


def run(bench: Bench, stage: Stage) -> None:
    """The stage."""
    size = bench.size("smol")
    lengths = (40, 9) if bench.small else (900, 300, 848)
    batch = [packed(lengths, bench.vocab(size), seed) for seed in range(2)]
    plain = once(bench, size, batch)
    for name, settings in CASES.items():
        # The rows of a small run are shorter than a tile otherwise.
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
    """A pass with every layer recomputed, timed, then once more for the numbers."""
    with bench.training(run_of(bench.model(size), bench.dtype, "full", recompute="full", **train)) as training:

        def one_pass() -> float:
            for chunk in training.chunks:
                chunk.zero_grad_buffer()
            return run_schedule(training, batch, forward_only=False)[0]

        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.seconds(one_pass, times=3 if bench.on_gpu else 1, warm=int(bench.on_gpu))
        loss = one_pass()
        bench.synchronize()
        gradients = torch.cat([main_grad(held.parameter).flatten().cpu() for held in training.part.held()])
        return Result(loss, gradients, seconds, torch.cuda.max_memory_allocated() if bench.on_gpu else 0)


def main_grad(parameter: nn.Parameter) -> Tensor:
    """Where Megatron's DistributedDataParallel sums a gradient."""
    return parameter.main_grad  # type: ignore[attr-defined,no-any-return]


def after_a_step(bench: Bench, size: str, batch: Sequence[Microbatch], *, offload: bool) -> float:
    """The loss of the second step."""
    optim = dataclasses.replace(OPTIM, cpu_offload=offload)
    with bench.training(run_of(bench.model(size), bench.dtype, "full", optim=optim)) as training:
        train_step(training, batch)
        return train_step(training, batch).loss
