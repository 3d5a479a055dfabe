"""Blocks of attention put together, beside a softmax over everything at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swift_mega.ops.blocks import Block, Parts, Towards, backward, block, forward


def seen(queries: range, keys: range, causal: bool, window: int | None) -> Tensor:
    """[queries, keys] bool by position: the definition."""
    return torch.tensor(
        [[(not causal or p >= s) and (window is None or p - s < window) for s in keys] for p in queries],
        dtype=torch.bool,
    )


def drawn(blocks: list[Block], queries: int, keys: int) -> Tensor:
    """How often a block says that a query sees a key."""
    found = torch.zeros(queries, keys, dtype=torch.int)
    for one in blocks:
        for i in range(one.queries):
            aligned = i + one.keys - one.queries
            for j in range(one.keys):
                if (not one.causal or j <= aligned) and (one.left is None or j >= aligned - one.left):
                    found[one.q + i, one.k + j] += 1
    return found


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(-10, 20), st.booleans(), st.none() | st.integers(1, 12))
def test_blocks_show_what_the_positions_say(queries, keys, shift, causal, window):
    if not causal:
        window = None
    made = block(0, queries, 0, keys, shift=shift, causal=causal, window=window)
    expected = seen(range(shift, shift + queries), range(keys), causal, window)
    assert drawn(made, queries, keys).equal(expected.int())
    for one in made:
        assert expected[one.q : one.q + one.queries, one.k : one.k + one.keys].any(1).all(), "a query without a key"
        assert one.left is None or one.left >= 0


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax over all keys at once."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


CASES = [
    (heads, kv, dims, window, softcap, causal)
    for heads, kv in ((4, 4), (4, 2), (9, 3), (4, 1))
    for dims, window, softcap, causal in (
        ((8, 8), None, None, True), ((8, 8), 150, None, True), ((8, 8), None, 2.0, True), ((12, 8), None, None, True),
        ((12, 8), 37, 1.5, True), ((8, 8), None, None, False),
    )
]  # fmt: skip


@pytest.mark.parametrize(("heads", "kv", "dims", "window", "softcap", "causal"), CASES)
def test_parts_of_the_keys_make_the_whole(heads, kv, dims, window, softcap, causal, monkeypatch):
    """Queries in the middle of an example, keys in five parts that come in any order."""
    monkeypatch.setattr("swift_mega.ops.blocks.QUERY_TILE", 32)
    monkeypatch.setattr("swift_mega.ops.blocks.KEY_TILE", 48)
    torch.manual_seed(0)
    total, start, stop = 400, 150, 330
    q = torch.randn(stop - start, heads, dims[0], dtype=torch.float64, requires_grad=True)
    k = torch.randn(total, kv, dims[0], dtype=torch.float64, requires_grad=True)
    v = torch.randn(total, kv, dims[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(stop - start, heads, dims[1], dtype=torch.float64)
    scale = dims[0] ** -0.5
    expected, lse = whole(q, k, v, seen(range(start, stop), range(total), causal, window), scale, softcap)
    expected.backward(grad)

    parts, cuts = Parts(q, dims[1]), [(150, 230), (330, 400), (0, 100), (230, 330), (100, 150)]
    with torch.no_grad():
        made = [
            block(0, len(q), first, last - first, shift=start - first, causal=causal, window=window)
            for first, last in cuts
        ]
        for each in made:
            forward(parts, q, k, v, each, scale=scale, softcap=softcap)
        towards = Towards(*(torch.zeros_like(x) for x in (q, k, v)))
        for each in made:
            backward(towards, grad, q, k, v, parts.out, parts.lse, each, scale=scale, softcap=softcap)
    assert (parts.out - expected).abs().max() < 1e-12
    assert (parts.lse - lse).abs().max() < 1e-12
    for found, wanted in zip((towards.query, towards.key, towards.value), (q.grad, k.grad, v.grad), strict=True):
        assert (found - wanted).abs().max() < 1e-11
