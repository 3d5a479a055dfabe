"""Causal attention over examples that lie one after another in a row: no token sees another example.

On CUDA this is flash-attn's varlen kernel; elsewhere, and where flash-attn is not installed, torch's own attention per
example, which never builds a [tokens, tokens] matrix over the whole row.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _flash_varlen() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: Sequence[int], cu_seqlens: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of every token to the tokens before it, and itself, in its own example.

    query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim], heads a multiple of kv_heads.
    bounds: first token of each example and the end of the last, on the host; cu_seqlens: the same as int32 on the device.
    window: a token sees itself and window - 1 tokens before it; None sees all.
    Returns [tokens, heads, head_dim].
    """
    flash = _flash_varlen() if query.is_cuda else None
    if flash is None:
        return attention_reference(query, key, value, bounds=bounds, scale=scale, window=window)
    longest = max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    return flash(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
    )  # fmt: skip


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, bounds: Sequence[int], scale: float, window: int | None
) -> Tensor:
    """`attention` in torch; shapes as there."""
    outs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        banded = window is not None and end - start > window
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=_band(end - start, window or 0, query.device) if banded else None,
            is_causal=not banded, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@functools.lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] bool: True where the query may see the key."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)
