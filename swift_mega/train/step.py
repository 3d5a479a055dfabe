"""One optimizer step, and one evaluation: microbatches through Megatron's schedule.

The loss is a sum over tokens; Megatron divides the gradients, once, by the number of trained tokens of the whole global batch, so
how examples fall into microbatches and ranks changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from swift_mega.data.pack import Microbatch
from swift_mega.parallel.context import Context
from swift_mega.parallel.sequence import held_tokens
from swift_mega.train.build import Training


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean over the trained tokens of the global batch."""
    trained_tokens: int
    tokens: int
    grad_norm: float | None
    learning_rate: float
    applied: bool
    """Whether the optimizer took the step: it skips one whose gradients are not finite."""


def train_step(training: Training, batch: Sequence[Microbatch]) -> StepResult:
    """Forward, backward, reduce, clip, step. Collective; `batch` is this data rank's share of the global batch."""
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    rate = training.optimizer.param_groups[0]["lr"] if training.optimizer.param_groups else 0.0
    loss, trained, tokens = run_schedule(training, batch, forward_only=False)
    applied, grad_norm, _ = training.optimizer.step()
    training.scheduler.step(increment=1)
    return StepResult(loss, trained, tokens, None if grad_norm is None else float(grad_norm), rate, bool(applied))


def evaluate(training: Training, batches: Sequence[Sequence[Microbatch]]) -> float:
    """Mean loss over the trained tokens of all batches. Collective."""
    for chunk in training.chunks:
        chunk.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            loss, trained, _ = run_schedule(training, batch, forward_only=True)
            total, count = total + loss * trained, count + trained
    for chunk in training.chunks:
        chunk.train()
    return total / max(count, 1)


def run_schedule(training: Training, batch: Sequence[Microbatch], *, forward_only: bool) -> tuple[float, int, int]:
    """All microbatches of one global batch. Returns (mean loss, trained tokens, tokens without padding), on every rank."""
    chunks = training.chunks
    iterators = [iter(batch) for _ in chunks]
    stores = get_forward_backward_func()(
        forward_step_func=partial(_forward, training),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batch),
        seq_length=max(len(row.tokens) for row in batch),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _reduce(training, stores, sum(int(row.lengths.sum()) for row in batch))


def _forward(training: Training, rows: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    row = _to(held_part(next(rows), training.groups.row), training.device.device)
    return model(row.tokens, row.positions, row.cu_seqlens, training.groups.row), partial(_loss, training, model, row)


def _loss(training: Training, model: Any, row: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    if training.run.parallel.overlap_param_gather:
        _await_head(training, model)
    loss = training.objective.loss(training.head, model.module, hidden, row)
    return loss.sum, loss.count.to(torch.int), {"loss": loss.sum.detach(), "count": loss.count}


def _await_head(training: Training, model: DistributedDataParallel) -> None:
    """Waits for the head's weights. Megatron waits for parameters in the forward hook of their module, and the head's module is not
    called: log-probabilities read its weight and bias. Without this the last step's values would be used, silently."""
    for parameter in (training.part.head_weight, training.part.head_bias):
        if parameter in model.param_to_bucket_group:
            model.param_to_bucket_group[parameter].finish_param_sync()


def held_part(row: Microbatch, context: Context | None) -> Microbatch:
    """What this context rank holds of a row; cu_seqlens and lengths stay those of the whole."""
    if context is None:
        return row
    held = held_tokens(row.cu_seqlens.tolist(), context.mesh, context.rank)
    return replace(row, tokens=row.tokens[held], labels=row.labels[held], positions=row.positions[held])


def _to(row: Microbatch, device: torch.device) -> Microbatch:
    """The row on the device; cu_seqlens stays on the host, where the model wants it."""
    if device.type == "cpu":
        return row
    moved = {name: getattr(row, name).to(device, non_blocking=True) for name in ("tokens", "labels", "positions")}
    return replace(row, **moved)


def _reduce(training: Training, stores: list[dict[str, Tensor]], tokens: int) -> tuple[float, int, int]:
    """Sums over data ranks from the last stage, told to every rank. Float64: counts stay exact and 1,000 ranks lose no digit."""
    groups = training.groups
    mine = torch.zeros(3, dtype=torch.float64, device=training.device.device)
    if groups.is_last_stage and groups.coordinate.tensor == 0:
        for store in stores:
            mine[0] += store["loss"].double()
            mine[1] += store["count"].double()
        mine[2] += tokens if groups.coordinate.context == 0 else 0
    dist.all_reduce(mine, group=groups.world)
    loss, count, seen = mine.tolist()
    return loss / max(count, 1), int(count), int(seen)
