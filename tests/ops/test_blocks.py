"""Merged blocks of attention against one softmax over all keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swift_mega.ops.blocks import Block, Gradients, Parts, backward, block, forward
from swift_mega.ops.flash_attn_kernels import flash_attn_2, flash_attn_3
from swift_mega.ops.torch_kernels import TORCH_FLASH
from swift_mega.parallel.sequence import ring_steps
from swift_mega.parallel.split import split_row
from tests.ops import kernel_stand_ins as stand_ins


def seen(queries: range, keys: range, causal: bool, window: int | None) -> Tensor:
    """[queries, keys] bool by position, after the definition."""
    return torch.tensor(
        [[(not causal or p >= s) and (window is None or p - s < window) for s in keys] for p in queries],
        dtype=torch.bool,
    )


def drawn(blocks: list[Block], queries: int, keys: int) -> Tensor:
    """For every query and key, the number of blocks in which the query sees the key."""
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
        ((8, 8), None, None, True),
        ((8, 8), 150, None, True),
        ((8, 8), None, 2.0, True),
        ((12, 8), None, None, True),
        ((12, 8), 37, 1.5, True),
        ((8, 8), None, None, False),
    )
]


@pytest.mark.parametrize(("heads", "kv", "dims", "window", "softcap", "causal"), CASES)
def test_parts_of_the_keys_make_the_whole(heads, kv, dims, window, softcap, causal, monkeypatch):
    """Queries in the middle of an example, and keys in five parts, in any order."""
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
        grads = Gradients(*(torch.zeros_like(x) for x in (q, k, v)))
        for each in made:
            backward(grads, grad, q, k, v, parts.out, parts.lse, each, scale=scale, softcap=softcap)
    assert (parts.out - expected).abs().max() < 1e-12
    assert (parts.lse - lse).abs().max() < 1e-12
    for found, wanted in zip((grads.query, grads.key, grads.value), (q.grad, k.grad, v.grad), strict=True):
        assert (found - wanted).abs().max() < 1e-11


# --- the calls of CUDA's kernels, with stand-ins for these

FLASH_2 = flash_attn_2(stand_ins.flash_2_forward, stand_ins.flash_2_backward, "2.8")
FLASH_3 = flash_attn_3(stand_ins.flash_3_forward, stand_ins.flash_3_backward)


@pytest.mark.parametrize(("kernel", "at_once"), [(FLASH_2, 1), (FLASH_3, 1 << 40), (TORCH_FLASH, 1 << 40)])
@pytest.mark.parametrize(("heads", "kv", "dims", "window", "softcap", "causal"), CASES)
def test_the_calls_of_the_kernels(
    heads, kv, dims, window, softcap, causal, kernel, at_once, monkeypatch, torch_operators
):
    """Three examples over a ring of two ranks; the gradient of one key head after another, or of all in one call."""
    monkeypatch.setattr("swift_mega.ops.flash.AT_ONCE", at_once)
    if softcap is not None and not kernel.softcap:
        return  # `choose` gives such calls to tiles
    monkeypatch.setattr("swift_mega.ops.blocks._kernel", lambda query, softcap: kernel)
    torch.manual_seed(0)
    cu, scale = (0, 30, 44, 80), dims[0] ** -0.5
    q, k, v = (
        torch.randn(80, n, d, dtype=torch.float64, requires_grad=True)
        for n, d in ((heads, dims[0]), (kv, dims[0]), (kv, dims[1]))
    )
    grad = torch.randn(80, heads, dims[1], dtype=torch.float64)
    example = torch.bucketize(torch.arange(80), torch.tensor(cu[1:-1]), right=True)
    mask = seen(range(80), range(80), causal, window) & (example[:, None] == example[None])
    expected, _ = whole(q, k, v, mask, scale, softcap)
    expected.backward(grad)
    grads = Gradients(*(torch.zeros_like(x) for x in (q, k, v)))
    with torch.no_grad():
        for position in range(2):
            local = [torch.cat([torch.arange(a, b) for a, b in each]) for each in split_row(cu, 2).ranges]
            mine, parts = local[position], Parts(q[local[position]], dims[1])
            steps = ring_steps(cu, 2, position, causal=causal, window=window)
            keys = [local[(position - step.behind) % 2] for step in steps]
            for step, there in zip(steps, keys, strict=True):
                forward(parts, q[mine], k[there], v[there], step.blocks, scale=scale, softcap=softcap)
            assert (parts.out - expected[mine]).abs().max() < 1e-12
            for step, there in zip(steps, keys, strict=True):
                some = Gradients(*(torch.zeros_like(x) for x in (q[mine], k[there], v[there])))
                backward(
                    some,
                    grad[mine],
                    q[mine],
                    k[there],
                    v[there],
                    parts.out,
                    parts.lse,
                    step.blocks,
                    scale=scale,
                    softcap=softcap,
                )
                grads.query[mine] += some.query
                grads.key[there] += some.key
                grads.value[there] += some.value
    for found, wanted in zip((grads.query, grads.key, grads.value), (q.grad, k.grad, v.grad), strict=True):
        assert (found - wanted).abs().max() < 1e-11


def test_examples_that_lie_together_are_one_call(monkeypatch):
    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given[-1].starts_q.tolist())
        return FLASH_2.forward(*given)

    kernel = replace(FLASH_2, forward=counted)
    monkeypatch.setattr("swift_mega.ops.blocks._kernel", lambda query, softcap: kernel)
    (step,) = ring_steps(tuple(range(0, 81, 5)), 2, 1)  # chunks of 20: four whole examples in each
    q = torch.randn(40, 2, 4)
    forward(Parts(q, 4), q, q, q, step.blocks, scale=0.5)
    assert calls == [list(range(0, 41, 5))]


def test_examples_shorter_than_a_window_join_the_call_of_longer_ones(monkeypatch):
    calls = []

    def counted(*given: Any) -> Any:
        calls.append((given[-1].starts_q.tolist(), given[-1].left))
        return FLASH_2.forward(*given)

    kernel = replace(FLASH_2, forward=counted)
    monkeypatch.setattr("swift_mega.ops.blocks._kernel", lambda query, softcap: kernel)
    (step,) = ring_steps((0, 5, 25, 36, 40), 1, 0, window=11)
    q = torch.randn(40, 2, 4, dtype=torch.float64)
    parts = Parts(q, 4)
    forward(parts, q, q, q, step.blocks, scale=0.5)
    assert calls == [([0, 5, 25, 36, 40], 10)]
    example = torch.bucketize(torch.arange(40), torch.tensor([5, 25, 36]), right=True)
    mask = seen(range(40), range(40), True, 11) & (example[:, None] == example[None])
    assert (parts.out - whole(q, q, q, mask, 0.5, None)[0]).abs().max() < 1e-12
    calls.clear()
    forward(Parts(q, 4), q, q, q, [Block(0, 12, 0, 12, True), Block(12, 20, 12, 20, True, 10)], scale=0.5)
    assert [left for _, left in calls] == [None, 10]  # 12 keys are more than the second block sees
