"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464) over the examples of a packed row.

Each head has a state S [key_dim, value_dim], which is zero where an example begins. Each token does

    S = exp(decay) S,    S = S + key (beta (value - key S)),    result = query S

With beta = 1 the token's key then reads exactly the token's value from S. On CUDA, in narrow dtypes, flash-linear-attention's kernel
computes this where it is installed; elsewhere torch.

In torch, a chunk of tokens takes a few products. `fresh`, what each token writes for a given state before the chunk, solves a triangular
system (section 3.3 of the paper). Only the state passes from chunk to chunk. Sums are in float32 or wider.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from swift_mega.ops.kernels import AUTO, Form, Kernels, Op

CHUNK = 64
EPSILON = 1e-6
"""Added to the squared length of queries and keys, as in flash-linear-attention."""


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule  # type: ignore[no-any-return]


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    kernels: Kernels = AUTO,
) -> Tensor:
    """What every token reads from the state of its own example, after the token itself has been written.

    query, key: [tokens, heads, key_dim]; both are normalised to unit length here, and queries are divided by sqrt(key_dim).
    value: [tokens, heads, value_dim].
    decay: [tokens, heads] float32, at most 0: the logarithm of the factor on the state. beta: [tokens, heads], between 0 and 1.
    bounds: first token of each example and the end of the last, on the host. cu_seqlens: the same as int32 on the device.
    Returns [tokens, heads, value_dim].
    """
    run = kernels.form(GATED_DELTA, query.device, value.dtype).run
    return run(query, key, value, decay, beta, bounds=bounds, cu_seqlens=cu_seqlens)  # type: ignore[no-any-return]


def _lacks(device: torch.device, dtype: torch.dtype, case: None) -> str | None:
    if device.type != "cuda":
        return "CUDA"
    # The kernel refuses float32.
    if dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 or float16"
    return "flash-linear-attention, which is not installed" if _kernel() is None else None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, bounds: Sequence[int], cu_seqlens: Tensor
) -> Tensor:
    kernel = _kernel()
    assert kernel is not None
    out, _ = kernel(
        query[None],
        key[None],
        value[None],
        g=decay[None],
        beta=beta[None],
        scale=query.shape[-1] ** -0.5,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=cu_seqlens.long(),
    )
    return out[0]  # type: ignore[no-any-return]


def gated_delta_reference(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, *, bounds: Sequence[int], cu_seqlens: Tensor
) -> Tensor:
    """`gated_delta_rule` in torch, by chunks; shapes as there."""
    dtype, tokens = value.dtype, len(value)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lengths = [end - start for start, end in pairwise(bounds)]
    size = min(CHUNK, max(lengths))
    chunks = [-(-length // size) for length in lengths]
    counts = -(-cu_seqlens.long().diff() // size) * size
    place = places(cu_seqlens, counts, tokens)

    def laid(x: Tensor) -> Tensor:
        """[tokens, heads, ...] -> [chunks, heads, size, ...]. The last chunk of an example is padded with zeros, which change nothing."""
        spread = x.new_zeros(sum(chunks) * size, *x.shape[1:], dtype=wide).index_copy(0, place, x.to(wide))
        return spread.unflatten(0, (-1, size)).transpose(1, 2)

    q, k, v = laid(_unit(query.to(wide)) * query.shape[-1] ** -0.5), laid(_unit(key.to(wide))), laid(value)
    out = _by_chunk(q, k, v, laid(decay), laid(beta), chunks)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place).to(dtype)


def _running_sums(x: Tensor) -> Tensor:
    """Cumulative sums along the last dim. On CUDA cumsum has no deterministic form, but a product with a triangle of ones has."""
    if torch.are_deterministic_algorithms_enabled():
        return x @ x.new_ones(x.shape[-1], x.shape[-1]).triu()
    return x.cumsum(-1)


def _by_chunk(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, chunks: Sequence[int]) -> Tensor:
    """q, k [chunks, heads, size, key_dim], v [..., value_dim], decay, beta [chunks, heads, size] -> [..., value_dim].

    chunks: number of chunks of each example.
    """
    # Logarithm of the share of the state before the chunk that is left at each token.
    kept = _running_sums(decay)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    between = (kept[..., :, None] - kept[..., None, :]).masked_fill(later, float("-inf")).exp()
    left, until_end = kept.exp()[..., None], (kept[..., -1:] - kept).exp()[..., None]
    # fresh + strictly_lower(beta k k^T between) fresh = beta v - beta left k S, for the state S before the chunk
    system = (beta[..., None] * k) @ k.transpose(-1, -2) * between
    known = torch.cat((v, left * k), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    fresh, reading = solved.split((v.shape[-1], k.shape[-1]), -1)
    inside, from_before, to_state = q @ k.transpose(-1, -2) * between, q * left, (k * until_end).transpose(-1, -2)
    out, at = [], 0
    for count in chunks:
        state: Tensor | None = None
        for chunk in range(at, at + count):
            new, read = fresh[chunk], None
            if state is not None:
                new, read = new - reading[chunk] @ state, from_before[chunk] @ state
            mine = inside[chunk] @ new
            out.append(mine if read is None else mine + read)
            if chunk + 1 < at + count:
                written = to_state[chunk] @ new
                state = written if state is None else state * left[chunk, :, -1:] + written
        at += count
    return torch.stack(out)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def places(cu_seqlens: Tensor, counts: Tensor, tokens: int) -> Tensor:
    """[tokens] int64: the place of each token when example e gets counts[e] places and its tokens take the first of them."""
    starts = cu_seqlens[:-1].long()
    shift = counts.cumsum(0) - counts - starts
    lengths = cu_seqlens.long().diff()
    moved = shift.repeat_interleave(lengths, output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) + moved


GATED_DELTA = Op(
    "gated_delta",
    (
        Form("fused", "flash-linear-attention", _by_kernel, _lacks),
        Form("reference", "torch, by chunks", gated_delta_reference),
    ),
)
