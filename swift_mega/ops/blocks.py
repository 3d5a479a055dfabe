"""Attention of some tokens to some others, block by block, with what is needed to put the parts of a softmax together.

Under context parallelism the keys of a row come in parts, from other ranks. The result over some keys is (out, lse): the average of
their values and the log of the sum of exp(score). Two such results over different keys make one:

    lse = log(exp(lse1) + exp(lse2)),    out = out1 + (out2 - out1) sigmoid(lse2 - lse1)

in float32 (float64 for float64), whatever the dtype of the tensors. The gradient of a block follows from the whole row's out and lse
alone (algorithm 2 of arXiv:2307.08691), so blocks come in any order there too.

On CUDA these are flash-attn's varlen kernels, one call for blocks that lie one after another; on CPU torch's flash kernel forward and
the products of ops/attention.py backward; elsewhere tiles in torch. None makes a [tokens, tokens] matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops.attention import _flash_kernels, gradients_of_keys
from swift_mega.ops.flash import backward_by_heads, suits
from swift_mega.ops.sinks import add_sinks

QUERY_TILE, KEY_TILE = 128, 2048


@dataclass(frozen=True)
class Block:
    """Queries [q, q + queries) and keys [k, k + keys) of one example, aligned at their ends: query i and key i + keys - queries.

    causal: a query sees no key after the one it is aligned with. left: nor one that lies more than this many before it (None: all).
    Every query sees a key.
    """

    q: int
    queries: int
    k: int
    keys: int
    causal: bool
    left: int | None = None


def block(q: int, queries: int, k: int, keys: int, *, shift: int, causal: bool, window: int | None) -> list[Block]:
    """What queries see of keys, `shift` positions before the first query the first key stands; none, one block or two.

    window: a query sees itself and window - 1 tokens before it.
    """
    if causal:
        late = max(0, -shift)  # queries before the first key
        q, queries, shift = q + late, queries - late, shift + late
        keys = min(keys, shift + queries)  # keys after the last query
    if queries <= 0 or keys <= 0:
        return []
    if causal and shift < keys - 1 and shift + queries > keys:  # the last queries see every key
        before = keys - shift
        return [
            *block(q, before, k, keys, shift=shift, causal=causal, window=window),
            *block(q + before, queries - before, k, keys, shift=keys, causal=causal, window=window),
        ]
    if window is not None:
        far = max(0, shift - window + 1)  # keys too far before the first query
        k, keys, shift = k + far, keys - far, shift - far
        queries = min(queries, keys - 1 - shift + window)
        if queries <= 0 or keys <= 0:
            return []
    diagonal = causal and shift < keys - 1
    assert not diagonal or shift + queries == keys, "aligned at the end"
    left = None
    if window is not None and shift + queries > window:
        left = keys - queries - shift + window - 1
    return [Block(q, queries, k, keys, diagonal, left)]


# ------------------------------------------------------------------------------------------------ results of parts


class Parts:
    """The softmax of `queries` tokens over all the keys that were added so far."""

    def __init__(self, query: Tensor, value_dim: int) -> None:
        """query: [tokens, heads, head_dim]."""
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        tokens, heads, _ = query.shape
        self.out = query.new_empty(tokens, heads, value_dim, dtype=exact)
        self.lse = query.new_empty(heads, tokens, dtype=exact)
        self.begun = 0  # tokens from here on have seen no key yet, and nothing is written there

    def add(self, first: int, out: Tensor, lse: Tensor) -> None:
        """The result over further keys, of the tokens from `first` on: out [n, heads, value_dim], lse [heads, n]."""
        last = first + len(out)
        fresh = first >= self.begun
        self._begin(first if fresh else last)
        ours, so_far = self.out[first:last], self.lse[:, first:last]
        if fresh:
            ours.copy_(out)
            so_far.copy_(lse)
            self.begun = last
            return
        weight = torch.sigmoid(lse - so_far).nan_to_num_(0.0)  # neither saw a key: -inf - -inf
        ours.lerp_(out.to(ours.dtype), weight.t()[..., None])
        so_far.copy_(torch.logaddexp(so_far, lse))

    def _begin(self, end: int) -> None:
        """Tokens before `end` that have seen no key so far are the softmax over nothing."""
        if end > self.begun:
            self.out[self.begun : end] = 0.0
            self.lse[:, self.begun : end] = -torch.inf
            self.begun = end

    def finished(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse of the whole softmax; sinks: [heads], logits that join it and have no value (ops/sinks.py)."""
        self._begin(len(self.out))
        return (self.out, self.lse) if sinks is None else add_sinks(self.out, self.lse, sinks)


def forward(
    parts: Parts, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], *, scale: float, softcap: float | None = None
) -> None:  # fmt: skip
    """Adds what the queries see of these keys.

    query: [tokens, heads, head_dim]; key: [keys, kv_heads, head_dim]; value: [keys, kv_heads, value_dim]; heads a multiple of kv_heads.
    softcap: scores s become c tanh(s / c).
    """
    kernels = _kernels(query)
    for group in call_groups(blocks):
        first, last = group[0], group[-1]
        q = query[first.q : last.q + last.queries]
        k, v = (x[first.k : last.k + last.keys] for x in (key, value))
        if kernels is not None:
            parts.add(first.q, *_flash_forward(kernels[0], group, q, k, v, scale, softcap))
            continue
        for one in group:
            if softcap is None and query.shape[-1] == value.shape[-1] and query.device.type == "cpu":
                parts.add(one.q, *_cpu_forward(one, query, key, value, scale))
                continue
            q, k, v = query[one.q : one.q + one.queries], key[one.k : one.k + one.keys], value[one.k : one.k + one.keys]
            for start, first_key, last_key, hidden in _tiles(one, q.device):
                rows = q[start : start + QUERY_TILE]
                out, lse = _tile_forward(rows, k[first_key:last_key], v[first_key:last_key], hidden, scale, softcap)
                parts.add(one.q + start, out, lse)


@dataclass(frozen=True)
class Towards:
    """Where gradients are added up: like query, key and value of `backward`, in float32 or wider."""

    query: Tensor
    key: Tensor
    value: Tensor


def backward(
    towards: Towards, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, blocks: Sequence[Block], *,
    scale: float, softcap: float | None = None,
) -> None:  # fmt: skip
    """Adds the gradients that come of these keys; shapes as in `forward`, out and lse of the whole softmax.

    grad: [tokens, heads, value_dim], of out.
    """
    kernels = _kernels(query)
    for group in call_groups(blocks):
        first, last = group[0], group[-1]
        rows, columns = slice(first.q, last.q + last.queries), slice(first.k, last.k + last.keys)
        if kernels is not None:
            _flash_backward(
                kernels[1], group, towards, grad, query, key, value, out, lse, rows, columns, scale, softcap
            )  # fmt: skip
            continue
        if softcap is None and query.device.type == "cpu":
            _cpu_backward(towards, grad, query, key, value, out, lse, group, rows, columns, scale)
            continue
        for one in group:
            for start, first_key, last_key, hidden in _tiles(one, query.device):
                stop = min(start + QUERY_TILE, one.queries)
                rows = slice(one.q + start, one.q + stop)
                columns = slice(one.k + first_key, one.k + last_key)
                _tile_backward(towards, grad, query, key, value, out, lse, rows, columns, hidden, scale, softcap)


# ------------------------------------------------------------------------------------------------ torch


def _tiles(one: Block, device: torch.device) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """(first query, first key, end of keys, [queries, keys] what is hidden or None) of each tile that is not all hidden."""
    ahead = one.keys - one.queries
    for start in range(0, one.queries, QUERY_TILE):
        stop = min(start + QUERY_TILE, one.queries)
        most = stop + ahead if one.causal else one.keys
        least = 0 if one.left is None else max(0, start + ahead - one.left)
        for first in range(least, most, KEY_TILE):
            last = min(first + KEY_TILE, most)
            whole_right = not one.causal or last - 1 <= start + ahead
            whole_left = one.left is None or first >= stop - 1 + ahead - one.left
            hidden = None
            if not (whole_right and whole_left):
                distance = torch.arange(start + ahead, stop + ahead, device=device)[:, None] - torch.arange(
                    first, last, device=device
                )
                hidden = distance < 0 if one.causal else torch.zeros_like(distance, dtype=torch.bool)
                if one.left is not None:
                    hidden |= distance > one.left
            yield start, first, last, hidden


def _cpu_forward(one: Block, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's flash kernel: the whole block where it needs no mask of its own, else a tile of queries over the keys they see."""
    q, k, v = query[one.q : one.q + one.queries], key[one.k : one.k + one.keys], value[one.k : one.k + one.keys]
    if one.left is None and (not one.causal or one.queries == one.keys):
        return _kernel(q, k, v, scale, one.causal, None)
    ahead, found = one.keys - one.queries, []
    for start in range(0, one.queries, QUERY_TILE):
        stop = min(start + QUERY_TILE, one.queries)
        first = 0 if one.left is None else max(0, start + ahead - one.left)
        last = stop + ahead if one.causal else one.keys
        distance = torch.arange(start + ahead, stop + ahead)[:, None] - torch.arange(first, last)
        hidden = distance < 0 if one.causal else torch.zeros_like(distance, dtype=torch.bool)
        if one.left is not None:
            hidden |= distance > one.left
        mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        found.append(_kernel(q[start:stop], k[first:last], v[first:last], scale, False, mask))
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], 1)


def _cpu_backward(
    towards: Towards, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, group: Sequence[Block],
    rows: slice, columns: slice, scale: float,
) -> None:  # fmt: skip
    """By the products that attention without context parallelism has. rows, columns: queries and keys of the group."""
    exact = towards.query.dtype
    of_queries = [x[rows].to(exact) for x in (grad, query, out)]
    of_keys = [x[columns].to(exact) for x in (key, value)]
    into, lse = (towards.query[rows], towards.key[columns], towards.value[columns]), lse[:, rows]
    for one in group:
        mine, theirs = (
            slice(first, first + size)
            for first, size in ((one.q - rows.start, one.queries), (one.k - columns.start, one.keys))
        )
        g, q, o = (x[mine] for x in of_queries)
        k, v = (x[theirs] for x in of_keys)
        gradients_of_keys(
            g, q, k, v, o, lse[:, mine], into=(into[0][mine], into[1][theirs], into[2][theirs]), scale=scale,
            window=None if one.left is None else one.left + 1, causal=one.causal, add=True,
        )  # fmt: skip


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), lse[0]


def _by_kv_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, dim] -> [kv_heads, heads / kv_heads * tokens, dim]: queries that share keys are rows of one product."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1]).to(dtype)


def _scores(
    q: Tensor, k: Tensor, hidden: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[kv_heads, group * queries, keys], and of a soft-cap the factor of its derivative."""
    scores, slope = torch.bmm(q, k.transpose(1, 2)).mul_(scale), None
    if softcap is not None:
        bent = scores.div_(softcap).tanh_()
        slope = 1 - bent * bent
        scores = bent * softcap
    if hidden is not None:
        scores.view(len(k), -1, *hidden.shape).masked_fill_(hidden, -torch.inf)
    return scores, slope


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, kv_heads, tokens = q.shape[1], k.shape[1], len(q)
    keys, values = (x.transpose(0, 1).to(exact) for x in (k, v))
    scores, _ = _scores(_by_kv_head(q, kv_heads, exact), keys, hidden, scale, softcap)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
    out = torch.bmm(weights, values).view(heads, tokens, -1).transpose(0, 1)
    return out, lse.view(heads, tokens)


def _tile_backward(
    towards: Towards, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rows: slice, columns: slice,
    hidden: Tensor | None, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    exact = towards.query.dtype
    heads, kv_heads = query.shape[1], key.shape[1]
    q, g, o = (_by_kv_head(x[rows], kv_heads, exact) for x in (query, grad, out))
    k, v = (x[columns].transpose(0, 1).to(exact) for x in (key, value))
    scores, slope = _scores(q, k, hidden, scale, softcap)
    weights = scores.sub_(lse[:, rows].reshape(kv_heads, -1, 1)).exp_()
    towards.value[columns] += torch.bmm(weights.transpose(1, 2), g).transpose(0, 1)
    mean = (g * o).sum(-1, keepdim=True)
    inner = torch.bmm(g, v.transpose(1, 2)).sub_(mean).mul_(weights).mul_(scale)
    if slope is not None:
        inner.mul_(slope)
    towards.key[columns] += torch.bmm(inner.transpose(1, 2), q).transpose(0, 1)
    towards.query[rows] += torch.bmm(inner, k).view(heads, -1, query.shape[-1]).transpose(0, 1)


# ------------------------------------------------------------------------------------------------ flash-attn


def _kernels(query: Tensor) -> tuple[Any, Any] | None:
    """flash-attn's forward and backward pass, for tensors on CUDA of a dtype that it has, where it is installed."""
    return _flash_kernels() if suits(query) else None


def call_groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks that one varlen call can take: alike in what they hide, their queries and their keys each without a gap between."""
    begun: list[Block] = []
    left, unbounded = (
        None,
        0,
    )  # of what is begun: its `left`, and most keys of a block without one, which may be too few to need it
    for one in blocks:
        last = begun[-1] if begun else None
        own = one.keys if one.left is None else 0
        common, most = (left if one.left is None else one.left), max(unbounded, own)
        if last and not (
            last.q + last.queries == one.q
            and last.k + last.keys == one.k
            and last.causal == one.causal
            and left in (None, common)
            and (common is None or most <= common + 1)
        ):
            yield begun
            begun, common, most = [], one.left, own
        begun.append(one)
        left, unbounded = common, most
    if begun:
        yield begun


def _call(group: Sequence[Block], device: torch.device, scale: float, softcap: float | None) -> dict[str, Any]:
    """What both kernels are told."""

    def starts(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)

    queries, keys = [one.queries for one in group], [one.keys for one in group]
    left = next((one.left for one in group if one.left is not None), -1)
    return {
        "cu_seqlens_q": starts(queries), "cu_seqlens_k": starts(keys), "max_seqlen_q": max(queries), "max_seqlen_k": max(keys),
        "dropout_p": 0.0, "softmax_scale": scale, "causal": group[0].causal,
        "window_size_left": left, "window_size_right": 0 if group[0].causal else -1,
        "softcap": softcap or 0.0, "alibi_slopes": None,
    }  # fmt: skip


def _flash_forward(
    kernel: Any, group: Sequence[Block], q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    missing = q.shape[-1] - v.shape[-1]  # the kernels know one size
    v = F.pad(v, (0, missing)) if missing else v
    out, lse, *_ = kernel(q, k, v, **_call(group, q.device, scale, softcap), return_softmax=False)
    return out[..., : out.shape[-1] - missing], lse


def _flash_backward(
    kernel: Any, group: Sequence[Block], towards: Towards, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    lse: Tensor, rows: slice, columns: slice, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    q, k, v, g, o = query[rows], key[columns], value[columns], grad[rows].to(query.dtype), out[rows].to(query.dtype)
    missing = q.shape[-1] - v.shape[-1]
    if missing:
        g, v, o = (F.pad(x, (0, missing)) for x in (g, v, o))
    settings, of_rows = _call(group, q.device, scale, softcap), lse[:, rows].contiguous()
    for mine, theirs, found in backward_by_heads(kernel, g, q, k, v, o, of_rows, settings):
        towards.query[rows, mine] += found[0]
        towards.key[columns, theirs] += found[1]
        towards.value[columns, theirs] += found[2][..., : v.shape[-1] - missing]
