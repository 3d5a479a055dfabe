"""Who holds which token of a row, and what sees what, beside the definition by positions."""

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_mega.ops.blocks import Block
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import Run, blocks, pieces, ring_blocks, ring_pieces, runs


def work(found: Sequence[Block]) -> int:
    """Scores that blocks have: pairs of a query and a key that it sees."""
    return sum(_pairs(one) for one in found)


def _pairs(one: Block) -> int:
    total = one.queries * one.keys
    if one.causal:
        total -= one.queries * (one.queries - 1) // 2
    if one.left is not None:  # query i is aligned with key i + keys - queries and sees none before left of it
        ahead = one.keys - one.queries - one.left
        hidden = [max(0, ahead + i) for i in (0, one.queries - 1)]
        first = max(0, -ahead)
        count = max(0, one.queries - first)
        total -= (hidden[0] + hidden[1]) * count // 2 if count else 0
    return total


MESHES = [Mesh(1, 1), Mesh(2, 1), Mesh(1, 2), Mesh(4, 1), Mesh(1, 4), Mesh(2, 2), Mesh(4, 2), Mesh(2, 4), Mesh(3, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("times", (1, 3, 10))
def test_every_token_is_held_once_and_neighbours_make_a_ring_position(mesh: Mesh, times: int) -> None:
    tokens = mesh.multiple * times
    held = [
        [token for begin, end in pieces(tokens, mesh, rank) for token in range(begin, end)] for rank in range(mesh.size)
    ]
    assert sorted(itertools.chain.from_iterable(held)) == list(range(tokens))
    assert {len(each) for each in held} == {tokens // mesh.size}
    for position in range(mesh.ring):
        together = list(itertools.chain.from_iterable(held[position * mesh.ulysses : (position + 1) * mesh.ulysses]))
        assert together == [t for begin, end in ring_pieces(tokens, mesh.ring, position) for t in range(begin, end)]


@st.composite
def rows(draw: st.DrawFn, most: int = 4) -> tuple[int, tuple[int, ...]]:
    """A ring and a row whose tokens it can cut, of examples of any length."""
    ring = draw(st.integers(2, most))
    tokens = 2 * ring * draw(st.integers(1, 6))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5))) if tokens > 1 else []
    return ring, (0, *cuts, tokens)


@settings(max_examples=150, deadline=None)
@given(rows(), st.booleans(), st.none() | st.integers(1, 20))
def test_steps_of_the_ring_show_every_pair_once(row, causal, window):
    (ring, cu), window = row, window if causal else None
    example = [number for number, length in enumerate(b - a for a, b in itertools.pairwise(cu)) for _ in range(length)]
    held = [[t for begin, end in ring_pieces(cu[-1], ring, each) for t in range(begin, end)] for each in range(ring)]
    for position in range(ring):
        steps, found = ring_blocks(cu, ring, position, causal=causal, window=window), set()
        for step, shown in enumerate(steps):
            queries, keys = held[position], held[(position - step) % ring]
            pairs = [
                (queries[one.q + i], keys[one.k + j])
                for one in shown
                for i in range(one.queries)
                for j in range(one.keys)
                if (not one.causal or j <= i + one.keys - one.queries)
                and (one.left is None or j >= i + one.keys - one.queries - one.left)
            ]
            assert work(shown) == len(pairs)
            assert found.isdisjoint(pairs) and len(set(pairs)) == len(pairs)
            found.update(pairs)
        assert found == {
            (p, s)
            for p in held[position]
            for s in range(cu[-1])
            if example[p] == example[s] and (not causal or s <= p) and (window is None or p - s < window)
        }


def planned_slowly(
    cu: tuple[int, ...], ring: int, *, causal: bool, window: int | None
) -> list[list[tuple[Block, ...]]]:
    """[position][step] by looking at every example for every range and at every position for every step: the definition."""
    held = []
    for position in range(ring):
        found, first = [], 0
        for begin, end in ring_pieces(cu[-1], ring, position):
            for example, (start, stop) in enumerate(itertools.pairwise(cu)):
                low, high = max(begin, start), min(end, stop)
                last, here = found[-1] if found else None, first + low - begin
                if low < high and last and last.example == example and last.position + last.length == low - start:
                    found[-1] = Run(example, last.position, last.first, last.length + high - low)
                elif low < high:
                    found.append(Run(example, low - start, here, high - low))
            first += end - begin
        held.append(found)
    steps = [
        [blocks(held[each], held[(each - step) % ring], causal=causal, window=window) for each in range(ring)]
        for step in range(ring)
    ]
    needed = max(step for step in range(ring) if any(steps[step])) + 1
    return [[steps[step][position] for step in range(needed)] for position in range(ring)]


@settings(max_examples=400, deadline=None)
@given(rows(most=12), st.booleans(), st.none() | st.integers(1, 60))
def test_the_plan_of_one_position_is_that_of_all(row, causal, window):
    (ring, cu), window = row, window if causal else None
    expected = planned_slowly(cu, ring, causal=causal, window=window)
    found = [list(ring_blocks(cu, ring, position, causal=causal, window=window)) for position in range(ring)]
    assert found == expected


def test_a_row_of_ten_thousand_examples_is_planned_in_little_time() -> None:
    cu = tuple(range(0, 1_024_001, 100))  # 10240 examples
    begin = time.process_time()
    steps = ring_blocks(cu, 64, 63)
    assert (
        time.process_time() - begin < 0.1
    )  # 0.6 ms; 0.48 s when every position's steps were planned over all examples
    assert sum(work(step) for step in steps) == 160 * 100 * 101 // 2


def test_steps_that_nobody_needs_are_left_out() -> None:
    alone = tuple(range(0, 65, 8))  # examples of 8 tokens, chunks of 8: no rank sees another's keys
    assert [len(ring_blocks(alone, 4, position)) for position in range(4)] == [1, 1, 1, 1]
    assert len(ring_blocks((0, 64), 4, 0)) == 4
    assert (
        len(ring_blocks((0, 6400), 4, 0, window=100)) == 4
    )  # the neighbour of a chunk lies on either side of the ring
    assert all(work(step) <= 2 * 100 * 100 for step in ring_blocks((0, 6400), 4, 1, window=100)[1:])


def test_zigzag_gives_every_position_the_same_work() -> None:
    done = [sum(work(step) for step in ring_blocks((0, 4096), 4, position)) for position in range(4)]
    assert len(set(done)) == 1 and sum(done) == 4096 * 4097 // 2


def test_runs_join_what_lies_together() -> None:
    assert len(runs(((0, 4), (4, 8)), (0, 8))) == 1
    assert [run.length for run in runs(((0, 4), (6, 8)), (0, 3, 8))] == [3, 1, 2]
    assert blocks(runs(((0, 4),), (0, 8)), runs(((4, 8),), (0, 8)), causal=True, window=None) == ()
