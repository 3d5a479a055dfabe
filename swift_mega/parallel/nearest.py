"""The nearest layouts that work: a search over small changes of the settings, for the end of an error message."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product

from swift_mega.config.schema import Parallel
from swift_mega.parallel.mesh import WITH_INNER
from swift_mega.parallel.pipeline import balanced


def nearest_layouts(
    parallel: Parallel,
    world: int,
    *,
    layers: int,
    experts: int | None,
    works: Callable[[Parallel], bool],
    limit: int = 4,
) -> list[str]:
    """Up to `limit` changes of the settings that make them work on `world` ranks, the smallest change first."""
    found: list[str] = []
    candidates = set(_variants(parallel, max(world, 1), layers, experts))
    for candidate in sorted(candidates, key=lambda each: _distance(parallel, each)):
        if len(found) < limit and works(candidate):
            found.append(_difference(parallel, candidate))
    return found


def _variants(parallel: Parallel, world: int, layers: int, experts: int | None) -> Iterator[Parallel]:
    """Settings with other sizes, each with the layers per stage as given, and with the layers spread evenly."""
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    expert_sizes = divisors if experts else [1]
    expert_tensors = {parallel.expert_tensor, None, 1} if experts else {None}
    context = max(parallel.context, 1)
    contexts = {(context, parallel.cp), (context, "auto"), (1, "auto")}
    for tensor, pipeline, (context, cp), expert, expert_tensor in product(
        divisors, divisors, contexts, expert_sizes, expert_tensors
    ):
        if world % (tensor * pipeline * context):
            continue
        for virtual in {parallel.virtual_pipeline, 1} if pipeline > 1 else {1}:
            sized = replace(
                parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                cp=cp,  # type: ignore[arg-type]
                ulysses=parallel.ulysses if cp in WITH_INNER else None,
                expert=expert,
                expert_tensor=expert_tensor,
                sequence=tensor > 1 and (parallel.sequence or bool(experts)),
            )
            gather = sized.overlap_param_gather and sized.overlap_grad_reduce and sized.distributed_optimizer
            overlap = world > tensor * pipeline
            sized = replace(
                sized,
                overlap_grad_reduce=sized.overlap_grad_reduce and overlap,
                overlap_param_gather=gather and overlap,
            )
            yield sized
            even = replace(sized, pipeline_layout=None, first_stage_layers=None, last_stage_layers=None)
            yield even
            if layers % (pipeline * virtual) and layers > pipeline * virtual:
                yield replace(even, pipeline_layout=",".join(map(str, balanced(layers, pipeline * virtual))))


def _distance(parallel: Parallel, other: Parallel) -> tuple[float, ...]:
    """How far two settings are apart: doublings of sizes, and a little for every other change."""
    distance, changes = 0.0, 0
    for field in fields(Parallel):
        old, new = getattr(parallel, field.name), getattr(other, field.name)
        changes += old != new
        sized = isinstance(old, int) and isinstance(new, int) and not isinstance(old, bool) and old > 0
        distance += abs(math.log2(new / old)) if sized else 0.5 * (old != new)
    return distance, changes, -other.tensor, -other.pipeline


def _difference(parallel: Parallel, other: Parallel) -> str:
    changes = []
    for field in fields(Parallel):
        old, new = getattr(parallel, field.name), getattr(other, field.name)
        if old != new:
            changes.append(f"parallel.{field.name}={new if isinstance(new, str) else json.dumps(new)}")
    return " ".join(changes)
