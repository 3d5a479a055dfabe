"""One optimizer step, and one evaluation: microbatches through Megatron's schedule.

The loss is a sum over tokens. Megatron divides the gradients once, by the number of trained tokens of the global batch. So the result
does not depend on how examples are split into microbatches and over ranks. Losses of routers are means over microbatches
(models/modules/balancing.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from swift_mega.data.pack import Microbatch
from swift_mega.device.device import send
from swift_mega.models.modules.balancing import BALANCE, RouterLosses, Z, has_router_losses
from swift_mega.models.modules.router import Router
from swift_mega.parallel.context import Context
from swift_mega.parallel.sequence import held_tokens
from swift_mega.train.build import Training


@dataclass(frozen=True)
class StepResult:
    """The result of one step, the same on every rank."""

    loss: float
    """Mean over the trained tokens of the global batch, without the losses of routers."""
    trained_tokens: int
    tokens: int
    grad_norm: float | None
    learning_rate: float
    applied: bool
    """Whether the optimizer updated the parameters: it skips a step whose gradients are not finite."""
    router_losses: dict[str, float] = field(default_factory=dict)
    """Loss of routers by name, without its coefficient: mean over MoE layers and microbatches."""


def train_step(training: Training, batch: Sequence[Microbatch]) -> StepResult:
    """Forward, backward, gradient reduction, clipping, optimizer step. Collective. batch: this data rank's part of the global batch."""
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    rate = training.optimizer.param_groups[0]["lr"] if training.optimizer.param_groups else 0.0
    loss, trained, tokens = run_schedule(training, batch, forward_only=False)
    router_losses = read_router_losses(training, batch)
    applied, grad_norm, _ = training.optimizer.step()
    training.scheduler.step(increment=1)
    return StepResult(
        loss, trained, tokens, None if grad_norm is None else float(grad_norm), rate, bool(applied), router_losses
    )


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
    """Runs all microbatches of one global batch. Returns (mean loss, trained tokens, tokens without padding), the same on every rank."""
    chunks = training.chunks
    iterators = [iter(batch) for _ in chunks]
    if not forward_only:
        start_router_losses(training, batch)
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
    whole = next(rows)
    row = _to(held_part(whole, training.groups.row), training.device.device)
    hidden = model(row.tokens, row.positions, row.cu_seqlens, training.groups.row, _padding(training, whole))
    return hidden, partial(_loss, training, model, row)


def _loss(training: Training, model: Any, row: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    if training.run.parallel.overlap_param_gather:
        _await_head(training, model)
    loss = training.objective.loss(training.head, model.module, hidden, row)
    count = send(loss.count.to(torch.int), loss.sum.device)
    return loss.sum, count, {"loss": loss.sum.detach(), "count": count}


def _await_head(training: Training, model: DistributedDataParallel) -> None:
    """Waits until the head's parameters are gathered.

    Megatron waits for parameters in the forward hook of their module. The head's module is not called, because log-probabilities read its
    weight and bias directly. Without this wait the values of the last step would be used, without an error.
    """
    for parameter in (training.part.head_weight, training.part.head_bias):
        if parameter in model.param_to_bucket_group:
            model.param_to_bucket_group[parameter].finish_param_sync()


def held_part(row: Microbatch, context: Context | None) -> Microbatch:
    """This context rank's tokens of a packed row; cu_seqlens and lengths stay those of the whole row."""
    if context is None:
        return row
    held = held_tokens(row.cu_seqlens.tolist(), context.mesh, context.rank)
    return replace(row, tokens=row.tokens[held], labels=row.labels[held], positions=row.positions[held])


def _padding(training: Training, row: Microbatch) -> Tensor | None:
    """Mask of padding among this context rank's tokens, for the losses of routers; None: no padding, or no such losses."""
    padding = row.padding if has_router_losses(training.part.config) else None
    if padding is None:
        return None
    if (context := training.groups.row) is not None:
        padding = padding[held_tokens(row.cu_seqlens.tolist(), context.mesh, context.rank)]
    return send(padding, training.device.device)


def start_router_losses(training: Training, batch: Sequence[Microbatch]) -> None:
    """Gives every router the factor trained tokens / microbatches: Megatron divides all gradients by the trained tokens of the
    global batch, but losses of routers are means over microbatches. Collective.
    """
    if has_router_losses(training.part.config):
        trained, rows = _over_data(training, [sum(row.targets for row in batch), _filled(batch)])
        for losses in _router_losses(training):
            # Megatron divides by 1 where nothing is trained.
            losses.start(max(trained, 1) / max(rows, 1))


def read_router_losses(training: Training, batch: Sequence[Microbatch]) -> dict[str, float]:
    """The losses of routers in the step that was run, the same on every rank. Collective."""
    if not has_router_losses(training.part.config):
        return {}
    mine, wanted = list(_router_losses(training)), training.part.config
    names = [BALANCE] * (wanted.moe_router_load_balancing_type == "aux_loss") + [Z] * bool(wanted.moe_z_loss_coeff)
    zero = torch.zeros((), dtype=torch.float64, device=training.device.device)
    sums = torch.stack([sum((zero + m.sums[name] for m in mine if name in m.sums), zero) for name in names])
    # Every tensor and context rank has the part of the sum that belongs to its own tokens.
    dist.all_reduce(sums, group=training.groups.world)
    (rows,) = _over_data(training, [_filled(batch)])
    layers = sum(training.part.settings.moe_layers)
    return dict(zip(names, (sums / (max(rows, 1) * layers)).tolist(), strict=True))


def _router_losses(training: Training) -> Iterator[RouterLosses]:
    for chunk in training.part.chunks:
        yield from (module.losses for module in chunk.modules() if isinstance(module, Router))


def _filled(batch: Sequence[Microbatch]) -> int:
    """Number of microbatches that are not only padding."""
    return sum(bool(row.lengths.sum()) for row in batch)


def _over_data(training: Training, numbers: Sequence[int]) -> list[int]:
    """Sums over data ranks, the same on every rank."""
    where, device = training.groups.coordinate, training.device.device
    counts = where.tensor == 0 and where.context == 0 and where.pipeline == 0
    sums = torch.tensor([number * counts for number in numbers], dtype=torch.int64, device=device)
    dist.all_reduce(sums, group=training.groups.world)
    return [int(number) for number in sums.tolist()]


def _to(row: Microbatch, device: torch.device) -> Microbatch:
    """The packed row with tokens and positions on the device; the rest stays on the host, where model and loss read it."""
    return replace(row, tokens=send(row.tokens, device), positions=send(row.positions, device))


def _reduce(training: Training, stores: list[dict[str, Tensor]], tokens: int) -> tuple[float, int, int]:
    """(mean loss, trained tokens, tokens without padding): sums over data ranks from the last stage, the same on every rank.

    Sums are float64, so counts stay exact and a sum over 1,000 ranks loses no digit of a float32.
    """
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
