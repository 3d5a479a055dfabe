"""Attention of some tokens to some keys, block by block, and the merge of partial softmax results.

Under context parallelism the keys of a row arrive in parts, from other ranks. The result over some keys is (out, lse): the
softmax-weighted average of their values, and log(sum of exp(score)). Two results over different keys are merged by

    lse = log(exp(lse1) + exp(lse2)),    out = out1 + (out2 - out1) sigmoid(lse2 - lse1)

in float32 (float64 for float64), whatever the dtype of the tensors. The gradient of a block needs only out and lse of the whole row
(algorithm 2 of arXiv:2307.08691), so the backward pass may take blocks in any order too.

| device | dtype | computed by |
|---|---|---|
| CUDA | bf16, fp16 | flash-attn 3 or 2, else torch's flash op, one call for adjacent blocks; soft-cap needs flash-attn |
| CPU | all, without soft-cap | torch's CPU kernel forward, the products of ops/cpu_attention.py backward |
| both | the rest | tiles in torch, in float32 (float64 for float64) |

None of these builds a [tokens, tokens] matrix. The tiles are the reference form (ops/kernels.py): products and a softmax in torch, with
the formulas of the gradient written out, because autograd does not see the keys of other ranks.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from swift_mega.ops.attention_kernels import TILES, attention_kernel_name, kernel_for_blocks
from swift_mega.ops.cpu_attention import gradients_of_keys, part_forward
from swift_mega.ops.flash import backward_by_heads, padded
from swift_mega.ops.kernel import Call, Kernel
from swift_mega.ops.kernels import AUTO, Form, Kernels, Op
from swift_mega.ops.sinks import add_sinks

QUERY_TILE, KEY_TILE = 128, 2048
"""Queries and keys of a tile on the CPU. A tile should fit the CPU's cache."""
CUDA_QUERY_TILE, CUDA_TILE_SCORES = 1024, 1 << 26
"""Queries of a tile on CUDA, and its scores over all heads. A tile takes few kernel launches, and each should fill the device."""


@dataclass(frozen=True)
class Block:
    """Queries [q, q + queries) and keys [k, k + keys) of one example, aligned at their ends: query i with key i + keys - queries.

    causal: a query sees no key after the one it is aligned with.
    left: a query sees no key more than this many places before the one it is aligned with (None: no limit).
    Every query sees at least one key.
    """

    q: int
    queries: int
    k: int
    keys: int
    causal: bool
    left: int | None = None


def block(q: int, queries: int, k: int, keys: int, *, shift: int, causal: bool, window: int | None) -> list[Block]:
    """The blocks in which queries see keys: none, one or two.

    shift: position of the first query minus position of the first key.
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
    """Softmax attention of `queries` tokens over all keys that were added so far."""

    def __init__(self, query: Tensor, value_dim: int) -> None:
        """query: [tokens, heads, head_dim]."""
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        tokens, heads, _ = query.shape
        self.out = query.new_empty(tokens, heads, value_dim, dtype=exact)
        self.lse = query.new_empty(heads, tokens, dtype=exact)
        # Tokens from this index on have seen no key yet, and their out and lse are not written.
        self.begun = 0

    def add(self, first: int, out: Tensor, lse: Tensor) -> None:
        """Merges the result over further keys, for the tokens from `first` on. out: [n, heads, value_dim]; lse: [heads, n]."""
        last = first + len(out)
        fresh = first >= self.begun
        self._begin(first if fresh else last)
        ours, so_far = self.out[first:last], self.lse[:, first:last]
        if fresh:
            ours.copy_(out)
            so_far.copy_(lse)
            self.begun = last
            return
        weight = torch.sigmoid(lse - so_far).nan_to_num_(0.0)  # NaN where neither saw a key: -inf - -inf
        ours.lerp_(out.to(ours.dtype), weight.t()[..., None])
        so_far.copy_(torch.logaddexp(so_far, lse))

    def _begin(self, end: int) -> None:
        """Writes the softmax over no keys (out 0, lse -inf) for the tokens before `end` that have seen no key so far."""
        if end > self.begun:
            self.out[self.begun : end] = 0.0
            self.lse[:, self.begun : end] = -torch.inf
            self.begun = end

    def finished(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse of the whole softmax. sinks: [heads], further logits of the softmax without a value (ops/sinks.py)."""
        self._begin(len(self.out))
        return (self.out, self.lse) if sinks is None else add_sinks(self.out, self.lse, sinks)


def forward(
    parts: Parts,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    *,
    scale: float,
    softcap: float | None = None,
    kernels: Kernels = AUTO,
) -> None:
    """Adds to `parts` what the queries see of these keys.

    query: [tokens, heads, head_dim]; key: [keys, kv_heads, head_dim]; value: [keys, kv_heads, value_dim]; heads a multiple of kv_heads.
    softcap: scores s become c tanh(s / c).
    """
    tiles = kernels.of(BLOCKS) == "reference"
    kernel = None if tiles else _kernel(query, softcap)
    for group in call_groups(blocks):
        first, last = group[0], group[-1]
        q = query[first.q : last.q + last.queries]
        k, v = (x[first.k : last.k + last.keys] for x in (key, value))
        if kernel is not None:
            out, lse = kernel.forward(*padded(kernel, q, k, v), _call(group, q.device, scale, softcap))
            parts.add(first.q, out[..., : v.shape[-1]], lse)
            continue
        for one in group:
            q, k, v = query[one.q : one.q + one.queries], key[one.k : one.k + one.keys], value[one.k : one.k + one.keys]
            fits = softcap is None and query.shape[-1] == value.shape[-1] and not tiles
            if fits and query.device.type == "cpu":
                parts.add(one.q, *part_forward(q, k, v, scale=scale, causal=one.causal, left=one.left))
                continue
            for start, stop, first_key, last_key, hidden in _tiles(one, q):
                rows = q[start:stop]
                out, lse = _tile_forward(rows, k[first_key:last_key], v[first_key:last_key], hidden, scale, softcap)
                parts.add(one.q + start, out, lse)


@dataclass(frozen=True)
class Gradients:
    """Sums of gradients, with the shapes of query, key and value in `backward`, in float32 or wider."""

    query: Tensor
    key: Tensor
    value: Tensor


def backward(
    grads: Gradients,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Sequence[Block],
    *,
    scale: float,
    softcap: float | None = None,
    kernels: Kernels = AUTO,
) -> None:
    """Adds the gradients due to these keys to `grads`. Shapes as in `forward`; out and lse are those of the whole softmax.

    grad: [tokens, heads, value_dim], the gradient of out.
    """
    tiles = kernels.of(BLOCKS) == "reference"
    kernel = None if tiles else _kernel(query, softcap)
    for group in call_groups(blocks):
        first, last = group[0], group[-1]
        rows, columns = slice(first.q, last.q + last.queries), slice(first.k, last.k + last.keys)
        if kernel is not None:
            call = _call(group, query.device, scale, softcap)
            _kernel_backward(kernel, call, grads, grad, query, key, value, out, lse, rows, columns)
            continue
        if softcap is None and query.device.type == "cpu" and not tiles:
            _cpu_backward(grads, grad, query, key, value, out, lse, group, rows, columns, scale)
            continue
        for one in group:
            for start, stop, first_key, last_key, hidden in _tiles(one, query):
                rows = slice(one.q + start, one.q + stop)
                columns = slice(one.k + first_key, one.k + last_key)
                _tile_backward(grads, grad, query, key, value, out, lse, rows, columns, hidden, scale, softcap)


# ------------------------------------------------------------------------------------------------ torch


def _tiles(one: Block, query: Tensor) -> Iterator[tuple[int, int, int, int, Tensor | None]]:
    """(first query, end of queries, first key, end of keys, hidden) of each tile of a block in which a query sees a key.

    hidden: [queries, keys] bool, True where a query does not see a key; None: every query sees every key.
    query: [tokens, heads, head_dim].
    """
    ahead = one.keys - one.queries
    query_tile, key_tile = _tile_sizes(query)
    for start in range(0, one.queries, query_tile):
        stop = min(start + query_tile, one.queries)
        most = stop + ahead if one.causal else one.keys
        least = 0 if one.left is None else max(0, start + ahead - one.left)
        for first in range(least, most, key_tile):
            last = min(first + key_tile, most)
            whole_right = not one.causal or last - 1 <= start + ahead
            whole_left = one.left is None or first >= stop - 1 + ahead - one.left
            hidden = None
            if not (whole_right and whole_left):
                places = torch.arange(start + ahead, stop + ahead, device=query.device)[:, None]
                keys = torch.arange(first, last, device=query.device)
                hidden = keys > places if one.causal else torch.zeros_like(keys > places)
                if one.left is not None:
                    hidden |= keys < places - one.left
            yield start, stop, first, last, hidden


def _tile_sizes(query: Tensor) -> tuple[int, int]:
    """Queries and keys of a tile. query: [tokens, heads, head_dim]."""
    if query.device.type == "cpu":
        return QUERY_TILE, KEY_TILE
    return CUDA_QUERY_TILE, max(CUDA_QUERY_TILE // 2, CUDA_TILE_SCORES // (CUDA_QUERY_TILE * query.shape[1]))


def _cpu_backward(
    grads: Gradients,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    group: Sequence[Block],
    rows: slice,
    columns: slice,
    scale: float,
) -> None:
    """Uses the products of attention without context parallelism (ops/cpu_attention.py). rows, columns: queries and keys of the group."""
    exact = grads.query.dtype
    of_queries = [x[rows].to(exact) for x in (grad, query, out)]
    of_keys = [x[columns].to(exact) for x in (key, value)]
    into, lse = (grads.query[rows], grads.key[columns], grads.value[columns]), lse[:, rows]
    for one in group:
        mine, theirs = (
            slice(first, first + size)
            for first, size in ((one.q - rows.start, one.queries), (one.k - columns.start, one.keys))
        )
        g, q, o = (x[mine] for x in of_queries)
        k, v = (x[theirs] for x in of_keys)
        gradients_of_keys(
            g,
            q,
            k,
            v,
            o,
            lse[:, mine],
            into=(into[0][mine], into[1][theirs], into[2][theirs]),
            scale=scale,
            window=None if one.left is None else one.left + 1,
            causal=one.causal,
            add=True,
        )


def _by_kv_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, dim] -> [kv_heads, heads / kv_heads * tokens, dim]: queries that share a key head are the rows of one product."""
    return x.transpose(0, 1).reshape(kv_heads, -1, x.shape[-1]).to(dtype)


def _scores(
    q: Tensor, k: Tensor, hidden: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[kv_heads, group * queries, keys], and with a soft-cap the factor of its derivative (else None)."""
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
    grads: Gradients,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: slice,
    columns: slice,
    hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    exact = grads.query.dtype
    heads, kv_heads = query.shape[1], key.shape[1]
    q, g, o = (_by_kv_head(x[rows], kv_heads, exact) for x in (query, grad, out))
    k, v = (x[columns].transpose(0, 1).to(exact) for x in (key, value))
    scores, slope = _scores(q, k, hidden, scale, softcap)
    weights = scores.sub_(lse[:, rows].reshape(kv_heads, -1, 1)).exp_()
    grads.value[columns] += torch.bmm(weights.transpose(1, 2), g).transpose(0, 1)
    mean = (g * o).sum(-1, keepdim=True)
    inner = torch.bmm(g, v.transpose(1, 2)).sub_(mean).mul_(weights).mul_(scale)
    if slope is not None:
        inner.mul_(slope)
    grads.key[columns] += torch.bmm(inner.transpose(1, 2), q).transpose(0, 1)
    grads.query[rows] += torch.bmm(inner, k).view(heads, -1, query.shape[-1]).transpose(0, 1)


# ------------------------------------------------------------------------------------------------ CUDA


def _kernel(query: Tensor, softcap: float | None) -> Kernel | None:
    """The kernel that takes adjacent blocks in one call; None: there is none."""
    if query.device.type == "cpu":
        return None
    return kernel_for_blocks(query.device, query.dtype, query.shape[-1], softcap=softcap is not None)


def call_groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Groups of blocks that one varlen call can take: the queries and the keys are each adjacent, without gaps, and the masks agree."""
    begun: list[Block] = []
    # Of the group so far: its `left`, and the most keys of a block that has none. A block without `left` may join a group with one
    # if it has too few keys for the limit to hide any.
    left, unbounded = None, 0
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


@functools.lru_cache(maxsize=256)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[blocks + 1] int32 on the device. Cached, because every layer needs the same one for a row, forward and backward."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)


def _call(group: Sequence[Block], device: torch.device, scale: float, softcap: float | None) -> Call:
    """The arguments of a kernel call for adjacent blocks."""
    queries, keys = tuple(one.queries for one in group), tuple(one.keys for one in group)
    left = next((one.left for one in group if one.left is not None), None)
    return Call(
        _starts(queries, device), _starts(keys, device), max(queries), max(keys), scale, group[0].causal, left, softcap
    )


def _kernel_backward(
    kernel: Kernel,
    call: Call,
    grads: Gradients,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: slice,
    columns: slice,
) -> None:
    value_dim, dtype = value.shape[-1], query.dtype
    q, k, v = padded(kernel, query[rows], key[columns], value[columns])
    g, o = (F.pad(x, (0, v.shape[-1] - value_dim)) for x in (grad[rows].to(dtype), out[rows].to(dtype)))
    for mine, theirs, found in backward_by_heads(kernel, g, q, k, v, o, lse[:, rows].contiguous(), call):
        grads.query[rows, mine] += found[0][..., : query.shape[-1]]
        grads.key[columns, theirs] += found[1][..., : query.shape[-1]]
        grads.value[columns, theirs] += found[2][..., :value_dim]


@dataclass(frozen=True)
class BlocksCase:
    """What decides, besides device and dtype, how attention to blocks is computed."""

    head_dim: int
    softcap: bool = False


def _lacks_kernel(device: torch.device, dtype: torch.dtype, case: BlocksCase) -> str | None:
    if device.type == "cpu":
        return "CUDA"
    found = kernel_for_blocks(device, dtype, case.head_dim, softcap=case.softcap)
    return None if found is not None else "a kernel that takes blocks of such heads in this dtype"


def _lacks_products(device: torch.device, dtype: torch.dtype, case: BlocksCase) -> str | None:
    return None if device.type == "cpu" and not case.softcap else "the CPU, and scores without a soft-cap"


def _name(device: torch.device, dtype: torch.dtype, case: BlocksCase) -> str:
    return attention_kernel_name(device, dtype, case.head_dim, softcap=case.softcap, ring=True)


BLOCKS = Op(
    "attention_blocks",
    (
        Form("fused", _name, lacks=_lacks_kernel),
        Form("tuned", _name, lacks=_lacks_products),
        Form("reference", TILES),
    ),
)
"""`forward` and `backward` read what is asked for it."""
