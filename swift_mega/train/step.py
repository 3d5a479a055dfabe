"""One optimizer step, and one evaluation: microbatches through Megatron's schedule.

The loss of a microbatch is a sum of terms. Gradients are divided once, by the weight of the global batch (its trained tokens, say), which
the objective knows from the data. So the result does not depend on how examples are split into microbatches and over ranks. Losses of
routers are means over microbatches (models/modules/balancing.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from swift_mega.objectives.objective import Head, Output
from swift_mega.parallel.context import Context
from swift_mega.parallel.sequence import local_tokens
from swift_mega.train.wire import Training


@dataclass(frozen=True)
class Means:
    """Loss and metrics of one or more global batches, the same on every rank."""

    loss: float
    """Mean by the objective's weights, without the losses of routers."""
    weight: float
    """The objective's weight of the global batch."""
    trained_tokens: int
    tokens: int
    """Tokens without padding."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The objective's metrics (`Loss.metrics`), as means like the loss."""


@dataclass(frozen=True, kw_only=True)
class StepResult(Means):
    """The result of one step, the same on every rank."""

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
    means = run_schedule(training, batch, forward_only=False)
    router_losses = read_router_losses(training, batch)
    applied, grad_norm, _ = training.optimizer.step()
    training.scheduler.step(increment=1)
    return StepResult(
        **vars(means),
        grad_norm=None if grad_norm is None else float(grad_norm),
        learning_rate=rate,
        applied=bool(applied),
        router_losses=router_losses,
    )


def evaluate(training: Training, batches: Sequence[Sequence[Microbatch]]) -> Means:
    """Means over all batches. Collective."""
    with _evaluating(training.chunks):
        found = [run_schedule(training, batch, forward_only=True) for batch in batches]
    weight = sum(means.weight for means in found)

    def mean(values: Iterable[float]) -> float:
        return sum(value * means.weight for value, means in zip(values, found, strict=True)) / (weight or 1)

    return Means(
        mean(means.loss for means in found),
        weight,
        sum(means.trained_tokens for means in found),
        sum(means.tokens for means in found),
        {name: mean(means.metrics[name] for means in found) for name in training.objective.metrics},
    )


@contextmanager
def _evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within it, chunks compute without dropout and without gradients."""
    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, was in zip(chunks, before, strict=True):
            chunk.train(was)


def run_schedule(training: Training, batch: Sequence[Microbatch], *, forward_only: bool) -> Means:
    """Runs all microbatches of one global batch, after the frozen passes that the objective asks for. Collective."""
    rows = _weigh(training, batch)
    if not forward_only:
        _start_router_losses(training, rows)
    given = _run_passes(training, batch)
    stores = _run(training.chunks, list(zip(batch, given, strict=True)), partial(_forward, training), forward_only)
    return _reduce(training, stores, batch)


def run_forward(
    training: Training, batch: Sequence[Microbatch], ask: Callable[[Output], Any], *, weights: str = "policy"
) -> list[Any]:
    """What `ask` returns for each microbatch, on the last stage; [] on other stages. Without gradients and dropout. Collective.

    weights: as in `Pass`.
    """
    chunks: Sequence[Any] = training.chunks
    head = training.head
    reference: AbstractContextManager[None] = nullcontext()
    if weights == "base" and training.base is not None:
        chunks, head = training.base.part.chunks, training.base.head
    elif weights == "base":
        without = training.tuner.reference(training.part)
        assert without is not None, "the objective has a pass of base weights, and load_training made none"
        reference = without
    with reference, _evaluating(chunks):
        return _run(chunks, [(row, {}) for row in batch], partial(_ask, training, head, ask), True, collect=True)


Given = tuple[Microbatch, Mapping[str, Tensor]]
"""A whole microbatch, and what frozen passes left of it."""


def _run(
    chunks: Sequence[Any], rows: Sequence[Given], step: Callable[..., Any], forward_only: bool, collect: bool = False
) -> list[Any]:
    """Megatron's schedule. collect: the function that `step` returns makes any value, not a loss."""
    iterators = [iter(rows) for _ in chunks]
    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=max(len(row.tokens) for row, _ in rows),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _run_passes(training: Training, batch: Sequence[Microbatch]) -> list[dict[str, Tensor]]:
    """For each microbatch, what the objective's passes left of it (on the last stage)."""
    given: list[dict[str, Tensor]] = [{} for _ in batch]
    for each in training.objective.passes():
        # Other stages have no results, and need none.
        for mine, left in zip(given, run_forward(training, batch, each.ask, weights=each.weights), strict=False):
            mine[each.name] = left
    return given


def _hidden(training: Training, whole: Microbatch, model: torch.nn.Module) -> tuple[Tensor, Microbatch]:
    """The output of a chunk for a microbatch, and this context rank's part of it."""
    row = _to(local_part(whole, training.groups.row), training.device.device)
    return model(row.tokens, row.positions, row.cu_seqlens, training.groups.row, _padding(training, whole)), row


def _forward(training: Training, rows: Iterator[Given], model: torch.nn.Module) -> tuple[Tensor, Any]:
    whole, given = next(rows)
    hidden, row = _hidden(training, whole, model)
    return hidden, partial(_loss, training, model, row, given)


def _loss(
    training: Training, model: Any, row: Microbatch, given: Mapping[str, Tensor], hidden: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss = training.objective.loss(_output(training, training.head, model, hidden, row, given))
    if set(loss.metrics) != set(training.objective.metrics):
        raise RuntimeError(
            f"{type(training.objective).__name__}.loss gives metrics {sorted(loss.metrics)}, and the class declares "
            f"{sorted(training.objective.metrics)}"
        )
    sums = {"loss": loss.sum.detach(), **{name: value.detach() for name, value in loss.metrics.items()}}
    if loss.by_example and training.groups.coordinate.context:
        # The first context rank counts them.
        sums = {name: torch.zeros_like(value) for name, value in sums.items()}
    # The second number would divide the gradients; `wire` does that by the weight of the global batch.
    return loss.sum, torch.ones((), dtype=torch.int, device=loss.sum.device), sums


def _ask(
    training: Training, head: Head, ask: Callable[[Output], Any], rows: Iterator[Given], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    whole, given = next(rows)
    hidden, row = _hidden(training, whole, model)

    def answer(hidden: Tensor, non_loss_data: bool = True) -> Any:
        return ask(_output(training, head, model, hidden, row, given))

    return hidden, answer


def _output(
    training: Training, head: Head, model: Any, hidden: Tensor, row: Microbatch, given: Mapping[str, Tensor]
) -> Output:
    wrapped = isinstance(model, DistributedDataParallel)
    if wrapped and training.run.parallel.overlap_param_gather:
        _await_head(training, model)
    return Output(head, model.module if wrapped else model, hidden, row, given)


def _await_head(training: Training, model: DistributedDataParallel) -> None:
    """Waits until the head's parameters are gathered.

    Megatron waits for parameters in the forward hook of their module. The head's module is not called, because log-probabilities read its
    weight and bias directly. Without this wait the values of the last step would be used, without an error.
    """
    for parameter in (training.part.head_weight, training.part.head_bias):
        if parameter in model.param_to_bucket_group:
            model.param_to_bucket_group[parameter].finish_param_sync()


def local_part(row: Microbatch, context: Context | None) -> Microbatch:
    """This context rank's tokens of a packed row; cu_seqlens and lengths stay those of the whole row."""
    if context is None:
        return row
    local = local_tokens(row.cu_seqlens.tolist(), context.mesh, context.rank)
    return replace(row, tokens=row.tokens[local], labels=row.labels[local], positions=row.positions[..., local])


def _padding(training: Training, row: Microbatch) -> Tensor | None:
    """Mask of padding among this context rank's tokens, for the losses of routers; None: no padding, or no such losses."""
    padding = row.padding if has_router_losses(training.part.config) else None
    if padding is None:
        return None
    if (context := training.groups.row) is not None:
        padding = padding[local_tokens(row.cu_seqlens.tolist(), context.mesh, context.rank)]
    return send(padding, training.device.device)


def _weigh(training: Training, batch: Sequence[Microbatch]) -> Tensor:
    """Sets `training.weight` to the objective's weight of the global batch. Returns the number of microbatches in it that are not only
    padding, on the device. Collective.
    """
    mine = [sum(training.objective.weight(row) for row in batch), _filled(batch)]
    sums = _over_data(training, mine)
    # A batch without a term has no gradients, which stay zero.
    training.weight.copy_(sums[0].masked_fill(sums[0] == 0, 1))
    return sums[1]


def _start_router_losses(training: Training, rows: Tensor) -> None:
    """Gives every router the factor weight / microbatches: all gradients are divided by the weight of the global batch, but losses of
    routers are means over microbatches. rows: of `_weigh`.
    """
    if has_router_losses(training.part.config):
        factor = float(training.weight / rows.clamp(min=1))
        for losses in _router_losses(training):
            losses.start(factor)


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
    *totals, rows = torch.cat([sums, _over_data(training, [_filled(batch)])]).tolist()
    layers = sum(training.part.settings.moe_layers)
    return {name: total / (max(rows, 1) * layers) for name, total in zip(names, totals, strict=True)}


def _router_losses(training: Training) -> Iterator[RouterLosses]:
    for chunk in training.part.chunks:
        yield from (module.losses for module in chunk.modules() if isinstance(module, Router))


def _filled(batch: Sequence[Microbatch]) -> int:
    """Number of microbatches that are not only padding."""
    return sum(bool(row.lengths.sum()) for row in batch)


def _over_data(training: Training, numbers: Sequence[float]) -> Tensor:
    """Sums over data ranks, the same on every rank: float64 on the device, which is exact for counts."""
    where, device = training.groups.coordinate, training.device.device
    counts = where.tensor == 0 and where.context == 0 and where.pipeline == 0
    sums = send(torch.tensor([float(number) * counts for number in numbers], dtype=torch.float64), device)
    dist.all_reduce(sums, group=training.groups.world)
    return sums


def _to(row: Microbatch, device: torch.device) -> Microbatch:
    """The packed row with tokens and positions on the device; the rest stays on the host, where model and loss read it."""
    return replace(row, tokens=send(row.tokens, device), positions=send(row.positions, device))


def _reduce(training: Training, stores: list[dict[str, Tensor]], batch: Sequence[Microbatch]) -> Means:
    """Means over the global batch: sums over data and context ranks from the last stage, divided by the batch's weight.

    Sums are float64, so counts stay exact and a sum over 1,000 ranks loses no digit of a float32.
    """
    groups, names = training.groups, ("loss", *training.objective.metrics)
    mine = torch.zeros(len(names) + 3, dtype=torch.float64, device=training.device.device)
    if groups.is_last_stage and groups.coordinate.tensor == 0:
        for store in stores:
            mine[: len(names)] += torch.stack([store[name].double() for name in names])
        if groups.coordinate.context == 0:
            counts = [sum(row.targets for row in batch), sum(int(row.lengths.sum()) for row in batch)]
            mine[-3:-1] += send(torch.tensor(counts, dtype=torch.float64), mine.device)
    dist.all_reduce(mine, group=groups.world)
    mine[-1] = training.weight
    *sums, trained, seen, weight = mine.tolist()
    means = {name: total / weight for name, total in zip(names, sums, strict=True)}
    return Means(means.pop("loss"), weight, int(trained), int(seen), means)
