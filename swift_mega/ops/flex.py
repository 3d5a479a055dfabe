"""Soft-capped scores on CUDA where flash-attn isn't installed: torch's flex_attention, compiled once for rows of any length.

flex_attention builds one Triton kernel from attention, a function of a score (the cap) and a function of a (query, key) pair (same
example, key not after the query, within the window). Which blocks of 128 x 128 pairs contain a visible pair is computed on the host,
from the bounds of the examples. torch's own `create_block_mask` would evaluate every pair of tokens of the row.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries in a block of the mask, and keys in it."""


@functools.cache
def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flex_attention cannot compute such heads on this device; None: it can.

    Where there is a compiler, this compiles the kernels and runs them once, forward and backward. Some head sizes need more shared
    memory than some GPUs have, and only a run shows that.
    """
    if not torch.cuda.is_available():
        return "no GPU to compile flex_attention for"
    if importlib.util.find_spec("triton") is None:
        return "flex_attention needs Triton, which is not installed"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "flex_attention needs a C compiler: no cc, gcc or clang on PATH"
    tokens = 2 * BLOCK
    query, key = (
        torch.zeros(tokens, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for heads in (2, 1)
    )
    try:
        capped_attention(query, key, key, bounds=(0, tokens), scale=1.0, window=None, softcap=1.0).sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # raised by the stages of torch.compile, and by CUDA
        return f"flex_attention failed for head_dim {head_dim} in {dtype}: {str(error).strip().splitlines()[0]}"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)  # type: ignore[no-any-return]


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float,
    run: Callable[..., Any] | None = None,
) -> Tensor:
    """Causal attention within each example of a row, with scores s replaced by c tanh(s / c). Shapes as in `ops.attention.attention`.

    run: used in place of the compiled flex_attention.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = (run or _compiled())(
        q,
        k,
        v,
        score_mod=cap(softcap),
        block_mask=block_mask(tuple(bounds), window, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)  # type: ignore[no-any-return]


def cap(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """flex_attention's function of a score."""

    def score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@functools.lru_cache(maxsize=8)
def block_mask(bounds: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """Which keys the queries of a row see. Cached, because all layers of one kind use the same mask."""
    tokens = bounds[-1]
    starts = torch.tensor(bounds[:-1])
    example = torch.repeat_interleave(torch.tensor(bounds).diff())
    first = torch.arange(0, tokens, BLOCK)
    last = (first + BLOCK - 1).clamp_(max=tokens - 1)
    # First key seen by the first and by the last query of each block: where its example begins.
    begin, late = starts[example[first]], starts[example[last]]
    if window is not None:
        begin, late = begin.maximum(first - window + 1), late.maximum(last - window + 1)
    query, key = torch.arange(len(first))[:, None], torch.arange(len(first))[None]
    seen = (key >= begin[:, None] // BLOCK) & (key <= query)
    whole = seen & (key * BLOCK >= late[:, None]) & (key < query)
    count, which = _ordered(seen & ~whole, device)
    whole_count, whole_which = _ordered(whole, device)
    mask = _see(example.to(device, torch.int32), window)
    return BlockMask.from_kv_blocks(
        count, which, whole_count, whole_which, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(tokens, tokens)
    )


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each query block, int32: the number of its key blocks, [1, 1, blocks], and the key blocks, its own first, [1, 1, blocks,
    blocks].
    """
    order = torch.argsort(~blocks, dim=1, stable=True)
    count, order = (x[None, None].to(device, torch.int32) for x in (blocks.sum(1), order))
    return count, order


def _see(example: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """flex_attention's function of a pair. example: [tokens], the number of each token's example."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (example[query] == example[key]) & (query >= key)
        return inside if window is None else inside & (query - key < window)

    return seen
