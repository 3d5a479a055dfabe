"""Causal attention within the examples of a packed row: no token attends to another example.

| device | dtype | case | computed by |
|---|---|---|---|
| CUDA | bf16, fp16 | all but the next two lines | flash-attn 3 or 2 where installed, else torch's flash op (ops/attention_kernels.py) |
| CUDA | bf16, fp16 | soft-cap | flash-attn, else flex_attention (ops/flex.py), else tiles in torch |
| CUDA | bf16, fp16 | ALiBi | flash-attn 2, else another kernel with features (ops/alibi.py) to 32,768 tokens (fp16: 8,192), else tiles |
| CUDA | float32 | all but soft-cap | torch's memory-efficient op |
| CUDA | float32 soft-cap, float64 | all | tiles in torch (ops/blocks.py) |
| CPU | float32, float64 | all but soft-cap | torch's CPU kernel, gradient by blocks of queries (ops/cpu_attention.py) |
| CPU | any | soft-cap | tiles in torch |
| CPU | bf16, fp16 | plain | torch's CPU kernel, one example at a time |
| CPU | bf16, fp16 | window, sinks; ALiBi | like float32 on the CPU, with the same sums in float32; ALiBi converts to float32 |

`attention_kernel_name` says which of these a layer gets. None of them builds a [tokens, tokens] matrix. In the registry
(ops/kernels.py), CUDA kernels and flex_attention are the fused form and the rest is the tuned one. The reference form is one softmax over
all keys of an example, which autograd differentiates: it needs memory for a [length, length] matrix per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops import flex
from swift_mega.ops.alibi import with_positions
from swift_mega.ops.attention_kernels import Choice, attention_kernel_name, choose
from swift_mega.ops.blocks import Gradients, Parts, backward, block, forward
from swift_mega.ops.cpu_attention import row_attention
from swift_mega.ops.flash import flash
from swift_mega.ops.kernel import HALF, Call
from swift_mega.ops.kernels import AUTO, Form, Kernels, Op
from swift_mega.ops.sinks import sink_gradient

__all__ = ["ATTENTION", "AttentionCase", "attention", "attention_by_blocks", "attention_kernel_name"]


@dataclass(frozen=True)
class AttentionCase:
    """What decides, besides device and dtype, how attention is computed; the arguments of `choose`."""

    head_dim: int
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    longest: int = 0
    deterministic: bool = False
    """Whether torch's deterministic algorithms are on, which excludes some kernels."""

    def choice(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """The kernel on CUDA."""
        given = {"softcap": self.softcap, "alibi": self.alibi, "sinks": self.sinks}
        return choose(device, dtype, self.head_dim, longest=self.longest, **given)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """Attention of every token to itself and to the tokens before it in its own example.

    query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim], heads a multiple of kv_heads.
    value may have a smaller head_dim, v_head_dim.
    bounds: first token of each example and the end of the last, on the host; cu_seqlens: the same as int32 on the device.
    window: a token sees itself and window - 1 tokens before it; None: all tokens before it.
    softcap: scores s become c tanh(s / c) before the softmax (Gemma 2, arXiv:2408.00118).
    alibi: [heads] float32 slopes: slope * (position of the key) is added to a score (ops/alibi.py).
    sinks: [heads], one more logit in the softmax of each head, without a value (ops/sinks.py).
    Returns [tokens, heads, v_head_dim].
    """
    assert alibi is None or (softcap is None and sinks is None), "no model has both, and kernels differ in their order"
    case = AttentionCase(
        query.shape[-1],
        softcap=softcap is not None,
        alibi=alibi is not None,
        sinks=sinks is not None,
        longest=0 if alibi is None else max(end - start for start, end in pairwise(bounds)),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return kernels.form(ATTENTION, query.device, query.dtype, case).run(  # type: ignore[no-any-return]
        query,
        key,
        value,
        alibi,
        sinks,
        bounds=bounds,
        cu_seqlens=cu_seqlens,
        scale=scale,
        window=window,
        softcap=softcap,
    )


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    longest = max(end - start for start, end in pairwise(bounds))
    choice = choose(
        query.device,
        query.dtype,
        query.shape[-1],
        softcap=softcap is not None,
        alibi=alibi is not None,
        sinks=sinks is not None,
        longest=longest,
    )
    if choice.flex:
        assert softcap is not None
        return flex.capped_attention(query, key, value, bounds=bounds, scale=scale, window=window, softcap=softcap)
    assert choice.kernel is not None, "else the tuned form runs"
    if alibi is not None and not choice.kernel.alibi:
        query, key = with_positions(query, key, alibi, bounds=bounds, scale=scale)
        alibi = None
    left = None if window is None else window - 1
    call = Call(cu_seqlens, cu_seqlens, longest, longest, scale, True, left, softcap, alibi, bounds)
    return flash(choice.kernel, query, key, value, sinks, call)


def _without_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *,
    cu_seqlens: Tensor,
    **row: Any,
) -> Tensor:
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, alibi, sinks, cu_seqlens=cu_seqlens, **row)
    return _by_tiles(query, key, value, alibi, sinks, **row)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`attention` by its definition, in plain torch: one softmax per head and example. Sums are in float32 or wider."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    shared, outs = query.shape[1] // key.shape[1], []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1).to(exact) for x in (query, key, value))
        k, v = (x.repeat_interleave(shared, dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(end - start, device=query.device)
        distance = place[:, None] - place
        if alibi is not None:
            scores = scores - alibi.to(exact)[:, None, None] * distance
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((sinks.to(exact)[:, None, None].expand(-1, len(place), 1), scores), dim=-1)
        weights = scores.softmax(-1)
        outs.append(((weights if sinks is None else weights[..., 1:]) @ v).transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    *,
    bounds: Sequence[int],
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    half = query.dtype in HALF
    if softcap is not None or (half and (alibi is not None or sinks is not None or window is not None)):
        return _by_tiles(query, key, value, alibi, sinks, bounds=bounds, scale=scale, window=window, softcap=softcap)
    if alibi is not None:
        query, key = with_positions(query, key, alibi, bounds=bounds, scale=scale)
    value_dim = value.shape[-1]
    # The kernel has one head_dim for keys and values.
    value = F.pad(value, (0, query.shape[-1] - value_dim))
    if half:
        out = _by_example(query, key, value, bounds, scale)
    else:
        out = row_attention(query, key, value, sinks, bounds=bounds, scale=scale, window=window)
    return out if out.shape[-1] == value_dim else out[..., :value_dim]


def _by_example(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """One call of torch's attention per example: its CPU kernel then needs no mask. It sums in float32."""
    outs = []
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        outs.append(out[0].transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_tiles(
    query: Tensor, key: Tensor, value: Tensor, alibi: Tensor | None, sinks: Tensor | None, **settings: Any
) -> Tensor:
    """`attention_by_blocks`, with ALiBi as features. ALiBi is computed in float32, because positions need its digits."""
    dtype = query.dtype
    if alibi is not None:
        query, key, value = (x if dtype == torch.float64 else x.float() for x in (query, key, value))
        query, key = with_positions(query, key, alibi, bounds=settings["bounds"], scale=settings["scale"])
    return attention_by_blocks(query, key, value, sinks=sinks, **settings).to(dtype)


def attention_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bounds: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention` by ops/blocks.py, whose tiles in torch cover what no kernel covers. Shapes as in `attention`."""
    return _ByBlocks.apply(query, key, value, sinks, tuple(bounds), scale, window, softcap)  # type: ignore[no-any-return]


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        bounds: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        blocks = [
            one
            for start, end in pairwise(bounds)
            for one in block(start, end - start, start, end - start, shift=0, causal=True, window=window)
        ]
        parts = Parts(query, value.shape[-1])
        forward(parts, query, key, value, blocks, scale=scale, softcap=softcap)
        out, lse = parts.finished(sinks)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *([] if sinks is None else [sinks]))
        ctx.given = blocks, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *sinks = ctx.saved_tensors
        blocks, scale, softcap = ctx.given
        found = Gradients(*(torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)))
        backward(found, gradients[0], query, key, value, out, lse, blocks, scale=scale, softcap=softcap)
        grad_sinks = sink_gradient(gradients[0], out, lse, sinks[0]) if sinks else None
        grads = (sums.to(x.dtype) for sums, x in ((found.query, query), (found.key, key), (found.value, value)))
        return *grads, grad_sinks, None, None, None, None


def _lacks(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> str | None:
    if device.type == "cpu":
        return "CUDA"
    choice = case.choice(device, dtype)
    return None if choice.flex or choice.kernel is not None else "a kernel for such heads in this dtype"


def _name(device: torch.device, dtype: torch.dtype, case: AttentionCase) -> str:
    if device.type != "cpu":
        return case.choice(device, dtype).name
    return attention_kernel_name(device, dtype, case.head_dim, softcap=case.softcap, sinks=case.sinks)


ATTENTION = Op(
    "attention",
    (
        Form("fused", _name, _on_cuda, _lacks),
        Form("tuned", _name, _without_kernel),
        Form("reference", "torch, one softmax per example", attention_reference),
    ),
)
