"""Ring attention block by block, as parallel/ring.py computes it; this process runs the work of all ring ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_check.bench import Bench, relative
from benchmarks.gpu_check.definition import attention_in_float64
from benchmarks.gpu_check.record import Stage
from swift_mega.ops.blocks import Gradients, Parts, backward, forward
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import local_tokens, ring_steps

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 3e-5}
RINGS = (2, 4)


@dataclass(frozen=True)
class Row:
    """A packed row. bounds: cu_seqlens, in units of 1/128 of the row. window: in the same unit."""

    bounds: tuple[int, ...]
    window: int | None = None


ROWS = {
    "one example": Row((0, 128)),
    "three examples": Row((0, 9, 64, 128)),
    "one example, window": Row((0, 128), window=16),
}


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    dtype = torch.bfloat16
    for name, row in ROWS.items():
        for ring in RINGS:
            error = worst_error(bench.device.device, row, ring, dtype, small=bench.small)
            stage.check(f"ring of {ring}, {name}, bfloat16", error, LIMITS[dtype])


def worst_error(device: torch.device, row: Row, ring: int, dtype: torch.dtype, *, small: bool) -> float:
    """The largest relative error of the output and of the gradients of query, key and value."""
    unit, heads, kv_heads, head_dim = (1, 4, 2, 16) if small else (16, 8, 2, 128)
    bounds = tuple(unit * place for place in row.bounds)
    window = None if row.window is None else unit * row.window
    generator = torch.Generator(device=device).manual_seed(1)
    query, key, value, above = (
        torch.randn(bounds[-1], count, head_dim, generator=generator, device=device).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    out = attention_in_float64(*inputs, bounds=bounds, scale=head_dim**-0.5, window=window)
    exact = [out.detach(), *torch.autograd.grad(out, inputs, above.double())]
    found = around_the_ring(query, key, value, above, bounds, ring, window)
    return max(relative(one, other) for one, other in zip(found, exact, strict=True))


def around_the_ring(
    query: Tensor, key: Tensor, value: Tensor, above: Tensor, bounds: Sequence[int], ring: int, window: int | None
) -> list[Tensor]:
    """Output and gradients of a whole row in float32, computed ring rank by ring rank."""
    scale, starts = query.shape[-1] ** -0.5, tuple(bounds)
    named = [local_tokens(starts, Mesh(1, ring), rank).to(query.device) for rank in range(ring)]
    out, grad_query, grad_key, grad_value = (torch.zeros(x.shape, device=x.device) for x in (above, query, key, value))
    for rank, mine in enumerate(named):
        steps = [
            (named[(rank - step.behind) % ring], step.blocks) for step in ring_steps(starts, ring, rank, window=window)
        ]
        own = query[mine]
        parts = Parts(own, value.shape[-1])
        for theirs, blocks in steps:
            forward(parts, own, key[theirs], value[theirs], blocks, scale=scale)
        own_out, lse = parts.finished(None)
        out[mine] = own_out.float()
        of_query = torch.zeros(own.shape, device=own.device)
        for theirs, blocks in steps:
            sums = Gradients(of_query, *(torch.zeros(x[theirs].shape, device=x.device) for x in (key, value)))
            backward(
                sums, above[mine], own, key[theirs], value[theirs], own_out.to(query.dtype), lse, blocks, scale=scale
            )
            grad_key[theirs] += sums.key
            grad_value[theirs] += sums.value
        grad_query[mine] = of_query
    return [out, grad_query, grad_key, grad_value]
