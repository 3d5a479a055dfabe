"""The CUDA kernels as their documentation defines them, dense and on the CPU, with the parameters of the real ones.

They test the meaning of our calls: order and names of arguments, windows, the layout of the log-sum-exp. They say nothing about the
numbers of the real kernels.
"""

from typing import Any

import torch
from torch import Tensor


def pairs_seen(
    starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, causal: bool, left: int, right: int
) -> Tensor:
    """[queries, keys] bool, from flash-attn's docstring: aligned at the bottom right; a window around the aligned key; -1: no limit."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert longest_q == int(starts_q.diff().max()) and longest_k == int(starts_k.diff().max())
    mask = torch.zeros(int(starts_q[-1]), int(starts_k[-1]), dtype=torch.bool)
    right = 0 if causal else right
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        aligned = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        key = torch.arange(k1 - k0)[None]
        mask[q0:q1, k0:k1] = ((left < 0) | (key >= aligned - left)) & ((right < 0) | (key <= aligned + right))
    return mask


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, slopes: Tensor | None) -> Tensor:
    """[heads, queries, keys]. slopes: only where queries and keys are the same tokens."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        assert slopes.dtype == torch.float32 and slopes.shape == (q.shape[1],)
        place = torch.arange(len(q))
        scores = scores - slopes.double()[:, None, None] * (place[:, None] - place[None]).abs()
    return scores


def softmax_over(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [queries, heads, value_dim] and the log-sum-exp [heads, queries]."""
    assert q.shape[-1] % 8 == k.shape[-1] % 8 == v.shape[-1] % 8 == 0, "real kernels refuse other sizes"
    scores = _scores(q, k, scale, softcap, slopes).masked_fill(~mask, -torch.inf)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of arXiv:2307.08691: the softmax follows from out and lse alone."""
    assert all(x.stride(-1) == 1 for x in (grad, q, k, v, out)) and lse.is_contiguous()
    groups, copies = k.shape[1], q.shape[1] // k.shape[1]
    scores = _scores(q, k, scale, softcap, slopes)
    slope = torch.ones_like(scores)
    if softcap:
        slope = 1 - (_scores(q, k, scale, softcap, None) / softcap) ** 2
    weights = torch.exp(scores - lse[..., None]).masked_fill(~mask, 0)
    mean = (grad * out).sum(-1).t()[..., None]
    wide_k, wide_v = (x.repeat_interleave(copies, 1) for x in (k, v))
    inner = weights * (torch.einsum("qhd,khd->hqk", grad, wide_v) - mean) * scale * slope
    dk, dv = torch.einsum("hqk,qhd->khd", inner, q), torch.einsum("hqk,qhd->khd", weights, grad)
    dk, dv = (x.view(len(x), groups, copies, -1).sum(2) for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", inner, wide_k), dk, dv


# ------------------------------------------------------------------------------------------------ flash-attn 2


def flash_2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Any, ...]:
    """_flash_attn_varlen_forward of flash_attn.flash_attn_interface: (out, softmax_lse, S_dmask, rng_state)."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "the kernel knows one head size"
    assert dropout_p == 0
    mask = pairs_seen(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right
    )
    return *softmax_over(q, k, v, mask, softmax_scale, softcap, alibi_slopes), None, None


def flash_2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
) -> None:
    """_flash_attn_varlen_backward; writes to dq, dk, dv."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert all(x.stride(-1) == 1 for x in (dq, dk, dv))
    mask = pairs_seen(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right
    )
    found = gradients(dout, q, k, v, out, softmax_lse, mask, softmax_scale, softcap, alibi_slopes)
    for target, part in zip((dq, dk, dv), found, strict=True):
        target.copy_(part)


# ------------------------------------------------------------------------------------------------ flash-attn 3


def flash_3_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Any = None,
    v_new: Any = None,
    qv: Any = None,
    out_: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    cu_seqlens_k_new: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    page_table: Any = None,
    kv_batch_idx: Any = None,
    leftpad_k: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    seqlens_rotary: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 1,
    pack_gqa: Any = None,
    sm_margin: int = 0,
) -> tuple[Any, ...]:
    """_flash_attn_forward of hopper/flash_attn_interface.py (2026-08): (out, softmax_lse, out_accum, softmax_lse_accum)."""
    mask = pairs_seen(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right
    )
    return *softmax_over(q, k, v, mask, softmax_scale, softcap), None, None


def flash_3_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sequed_q: Any = None,
    sequed_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    softmax_scale: Any = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> None:
    """_flash_attn_backward; writes to dq, dk, dv."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    mask = pairs_seen(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, window_size_left, window_size_right
    )
    found = gradients(dout, q, k, v, out, softmax_lse, mask, softmax_scale, softcap)
    for target, part in zip((dq, dk, dv), found, strict=True):
        target.copy_(part)


# ------------------------------------------------------------------------------------------------ torch's operators


def torch_flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    **given: Any,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_forward with cu_seqlens. `given`: arguments of newer versions, at their defaults."""
    assert dropout_p == 0 and not return_debug_mask and not any(x is not None for x in given.values())
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "the kernel knows one head size"
    mask = pairs_seen(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window_size_left, window_size_right)
    out, lse = softmax_over(query, key, value, mask, scale, 0.0)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def torch_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward."""
    assert dropout_p == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.uint64
    mask = pairs_seen(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, window_size_left, window_size_right)
    return gradients(grad_out, query, key, value, out, logsumexp, mask, scale, 0.0)


def torch_efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float,
    seqlen_k: Any = None,
    window_size: int | None = None,
) -> tuple[Any, ...]:
    """aten::_efficient_attention_forward in its 1MHK form: lse [examples, heads, longest rounded up to 32], +inf after the end of an
    example."""
    assert bias is None and dropout_p == 0 and custom_mask_type == 1 and compute_log_sumexp and seqlen_k is None
    mask = pairs_seen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, True, (window_size or 0) - 1, 0)
    out, lse = softmax_over(*(_unbatched(x, query) for x in (query, key, value)), mask, scale, 0.0)
    padded = lse.new_full((len(cu_seqlens_q) - 1, query.shape[2], -(-max_seqlen_q // 32) * 32), torch.inf)
    for number, (start, end) in enumerate(zip(cu_seqlens_q, cu_seqlens_q[1:], strict=False)):
        padded[number, :, : end - start] = lse[:, start:end]
    state = torch.empty((), dtype=torch.long)
    return out[None], padded, state, state.clone(), max_seqlen_q, max_seqlen_k


def torch_efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Any,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float,
    num_splits_key: Any = None,
    window_size: int | None = None,
    shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:
    """aten::_efficient_attention_backward. It requires a log-sum-exp of +inf after the end of an example."""
    assert (
        bias is None
        and dropout_p == 0
        and custom_mask_type == 1
        and not bias_requires_grad
        and not shared_storage_dqdkdv
    )
    mask = pairs_seen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, True, (window_size or 0) - 1, 0)
    assert logsumexp.shape == (len(cu_seqlens_q) - 1, query.shape[2], -(-max_seqlen_q // 32) * 32)
    lengths = [int(length) for length in cu_seqlens_q.diff()]
    assert all(bool((lse[:, length:] == torch.inf).all()) for lse, length in zip(logsumexp, lengths, strict=True))
    lse = torch.cat([lse[:, :length] for lse, length in zip(logsumexp, lengths, strict=True)], 1)
    given = (_unbatched(x, query) for x in (grad_out_, query, key, value, out))
    found = gradients(*given, lse, mask, scale, 0.0)
    return *(x[None] for x in found), torch.empty(0)


def _unbatched(x: Tensor, query: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[0] == 1 and x.shape[2] == query.shape[2], "as many key heads as query heads"
    return x[0]


OPERATORS = {
    "_flash_attention_forward": torch_flash_forward,
    "_flash_attention_backward": torch_flash_backward,
    "_efficient_attention_forward": torch_efficient_forward,
    "_efficient_attention_backward": torch_efficient_backward,
}
