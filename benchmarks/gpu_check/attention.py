"""Packed attention compared with its definition, then speed and memory of long rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.bench import Bench, relative
from benchmarks.gpu_check.definition import attention_in_float64
from benchmarks.gpu_check.record import Stage
from swift_mega.ops.alibi import slopes
from swift_mega.ops.attention import attention
from swift_mega.ops.attention_kernels import attention_kernel_name

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 3e-5}
"""Limits of relative errors. bfloat16 has 8 bits of precision: rounding a result gives an error of 2e-3, and gradients are rounded
several times."""
BOUNDS = (0, 1, 38, 165, 421, 1024)
SMALL_BOUNDS = (0, 1, 20, 180)
"""cu_seqlens; the last example is longer than every window."""


@dataclass(frozen=True)
class Case:
    """Options of attention that differ between model families."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False


CASES = {
    "plain, 64": Case(8, 8, 64, 64),
    "GQA, 128": Case(16, 4, 128, 128),
    "MQA, 128": Case(8, 1, 128, 128),
    "GQA, 128, window": Case(16, 4, 128, 128, window=100),
    "GQA, 256 (Gemma)": Case(8, 4, 256, 256),
    "GQA, 256, window, soft-cap (Gemma 2)": Case(8, 4, 256, 256, window=100, softcap=50.0),
    "window, sinks (gpt-oss)": Case(16, 2, 64, 64, window=128, sinks=True),
    "latent, 192/128 (DeepSeek)": Case(16, 16, 192, 128),
    "ALiBi, 128 (Bloom)": Case(16, 16, 128, 128, alibi=True),
    "head size 80": Case(8, 8, 80, 80),
}


@dataclass(frozen=True)
class LongRow:
    """A packed row whose speed is measured, with 32 query heads and 8 key heads of dim 128."""

    tokens: int
    example: int
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs in which the query attends to the key."""
        return sum(min(place + 1, self.window or self.example) for place in range(self.example)) * (
            self.tokens // self.example
        )


LONG_ROWS = {
    "8k tokens, one example": LongRow(8192, 8192),
    "8k tokens, 16 examples": LongRow(8192, 512),
    "32k tokens, one example": LongRow(32768, 32768),
    "32k tokens, window 4k": LongRow(32768, 32768, 4096),
}


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    bounds = SMALL_BOUNDS if bench.small else BOUNDS
    for dtype, limit in LIMITS.items():
        for kernel, names in served(bench.device.device, dtype).items():
            stage.fact(f"{str(dtype)[6:]} by {kernel}", "; ".join(names))
        for name, case in CASES.items():
            stage.check(f"{name}, {str(dtype)[6:]}", worst_error(bench.device.device, case, dtype, bounds), limit)
    for name, row in LONG_ROWS.items() if bench.on_gpu else ():
        stage.fact(f"{name}: forward, backward, memory beyond inputs", _speed(bench, row))


def served(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    """Kernel (by its name in a run's header) -> the cases that it computes."""
    found: dict[str, list[str]] = {}
    for name, case in CASES.items():
        kernel = attention_kernel_name(
            device, dtype, case.head_dim, softcap=case.softcap is not None, alibi=case.alibi, sinks=case.sinks
        )
        found.setdefault(kernel, []).append(name)
    return found


def worst_error(device: torch.device, case: Case, dtype: torch.dtype, bounds: Sequence[int]) -> float:
    """The largest relative error of the output and of the gradients of query, key, value and sinks."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    tokens = bounds[-1]
    given = [
        draw(tokens, case.heads, case.head_dim),
        draw(tokens, case.kv_heads, case.head_dim),
        draw(tokens, case.kv_heads, case.value_dim),
        *([draw(case.heads)] if case.sinks else []),
    ]
    above = draw(tokens, case.heads, case.value_dim)
    alibi = torch.tensor(slopes(case.heads), device=device) if case.alibi else None
    settings: dict[str, Any] = dict(
        bounds=bounds, scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap, alibi=alibi
    )
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    found = _with_gradients(partial(attention, cu_seqlens=starts, **settings), given, above)
    exact = _with_gradients(partial(attention_in_float64, **settings), [x.double() for x in given], above)
    return max(relative(one, other) for one, other in zip(found, exact, strict=True))


def _with_gradients(function: Callable[..., Tensor], given: Sequence[Tensor], above: Tensor) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in given]
    out = function(*inputs[:3], **({"sinks": inputs[3]} if len(inputs) > 3 else {}))
    return [out.detach(), *torch.autograd.grad(out, inputs, above.to(out.dtype))]


def _speed(bench: Bench, row: LongRow) -> str:
    device, heads, kv_heads, head_dim = bench.device.device, 32, 8, 128
    query, key, value = (
        torch.randn(row.tokens, count, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    bounds = range(0, row.tokens + 1, row.example)
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    call = partial(
        attention, query, key, value, bounds=bounds, cu_seqlens=starts, scale=head_dim**-0.5, window=row.window
    )
    above = torch.randn_like(call())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward = bench.seconds(call)
    backward = bench.seconds(lambda: torch.autograd.grad(call(), (query, key, value), above)) - forward
    peak = torch.cuda.max_memory_allocated() - before
    work = row.pairs * heads * head_dim / 1e12
    return f"{4 * work / forward:.0f}, {10 * work / backward:.0f} TFLOP/s, {peak / 2**20:.0f} MiB"
