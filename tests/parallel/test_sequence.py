"""Which rank has which token of a row, and which queries see which keys, against the definition by positions."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_mega.ops.blocks import Block, call_groups
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.sequence import Run, Step, blocks, local_tokens, pieces, ring_steps, runs
from swift_mega.parallel.split import LAYER_COST_IN_KEYS, MIN_PIECE_TOKENS, split_row
from tests.te_stand_in import local


def work(found: Sequence[Block]) -> int:
    """The number of scores of some blocks: pairs of a query and a key that it sees."""
    return sum(_pairs(one) for one in found)


def _pairs(one: Block) -> int:
    total = one.queries * one.keys
    if one.causal:
        total -= one.queries * (one.queries - 1) // 2
    # Query i is aligned with key i + keys - queries, and sees no key more than `left` before it.
    if one.left is not None:
        ahead = one.keys - one.queries - one.left
        hidden = [max(0, ahead + i) for i in (0, one.queries - 1)]
        first = max(0, -ahead)
        count = max(0, one.queries - first)
        total -= (hidden[0] + hidden[1]) * count // 2 if count else 0
    return total


MESHES = [Mesh(1, 1), Mesh(2, 1), Mesh(1, 2), Mesh(4, 1), Mesh(1, 4), Mesh(2, 2), Mesh(4, 2), Mesh(2, 4), Mesh(3, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("times", (1, 3, 10))
def test_every_token_is_on_one_rank_and_neighbours_make_a_ring_rank(mesh: Mesh, times: int) -> None:
    tokens = mesh.multiple * times
    local = [
        [token for begin, end in pieces((0, tokens), mesh, rank) for token in range(begin, end)]
        for rank in range(mesh.size)
    ]
    assert sorted(itertools.chain.from_iterable(local)) == list(range(tokens))
    assert {len(each) for each in local} == {tokens // mesh.size}
    for ring_rank, whole in enumerate(split_row((0, tokens), mesh.ring).ranges):
        together = list(itertools.chain.from_iterable(local[ring_rank * mesh.ulysses : (ring_rank + 1) * mesh.ulysses]))
        assert together == [t for begin, end in whole for t in range(begin, end)]


@st.composite
def rows(draw: st.DrawFn, most: int = 4) -> tuple[int, tuple[int, ...]]:
    """A ring and a row that it can split, with examples of any length."""
    ring = draw(st.integers(2, most))
    tokens = 2 * ring * draw(st.integers(1, 6))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5))) if tokens > 1 else []
    return ring, (0, *cuts, tokens)


@settings(max_examples=300, deadline=None)
@given(rows(most=12))
def test_positions_of_a_ring_hold_as_many_tokens_each_once(row) -> None:
    ring, cu = row
    split = split_row(cu, ring)
    local = [[t for begin, end in mine for t in range(begin, end)] for mine in split.ranges]
    assert sorted(itertools.chain.from_iterable(local)) == list(range(cu[-1]))
    assert {len(mine) for mine in local} == {cu[-1] // ring}
    owners = [
        {ring_rank for ring_rank, mine in enumerate(local) if set(mine) & set(range(a, b))}
        for a, b in itertools.pairwise(cu)
    ]
    spread = {example for example, some in enumerate(owners) if len(some) > 1}
    assert [set(shared) for shared in split.shared] == [
        {e for e in spread if ring_rank in owners[e]} for ring_rank in range(ring)
    ]


def unevenness(cu: tuple[int, ...], ring: int) -> float:
    """The largest work of a ring rank over the mean: pairs, and the rest of a layer's work per token."""
    done = [
        sum(work(step.blocks) for step in ring_steps(cu, ring, ring_rank)) + LAYER_COST_IN_KEYS * cu[-1] // ring
        for ring_rank in range(ring)
    ]
    return max(done) * ring / sum(done)


@pytest.mark.parametrize("ring", (2, 4, 8, 16))
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", (0.002, 0.02, 0.2))
def test_work_is_even_whatever_the_lengths(ring: int, seed: int, mean: float) -> None:
    """Lognormal examples whose mean length is this share of the row."""
    tokens, draw = 32768, random.Random(seed)
    cu = [0]
    while cu[-1] < tokens:
        cu.append(min(tokens, cu[-1] + 1 + int(draw.lognormvariate(math.log(mean * tokens) - 0.5, 1))))
    assert unevenness(tuple(cu), ring) < 1.06


def test_examples_that_are_short_beside_a_share_stay_whole() -> None:
    """Keys are sent only for the one example at each border of two shares."""
    cu = tuple(itertools.accumulate((100 + 7 * (number % 13) for number in range(64)), initial=0))
    cu = (*cu, cu[-1] + -cu[-1] % 8)
    split = split_row(cu, 4)
    assert len(set(itertools.chain.from_iterable(split.shared))) <= 3
    assert [step.behind for step in ring_steps(cu, 4, 2)] == [0, 1]


def test_pieces_of_several_examples_are_one_call() -> None:
    """For any number of examples, the blocks of first and second pieces are two varlen calls per step on CUDA."""
    for ring_rank in range(4):
        for step in ring_steps((0, 256, 512, 768), 4, ring_rank):
            assert len(step.blocks) >= 6 and len(list(call_groups(step.blocks))) == 2


def test_a_long_example_among_short_ones_is_shared_by_all() -> None:
    cu = (0, 40, 40 + 2 * 8 * MIN_PIECE_TOKENS * 4 + 3, 4096)
    split = split_row(cu, 8)
    sizes = [sum(run.length for run in shared[1]) for shared in split.shared]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == cu[2] - cu[1]


@settings(max_examples=150, deadline=None)
@given(rows(), st.booleans(), st.none() | st.integers(1, 20))
def test_steps_of_the_ring_show_every_pair_once(row, causal, window):
    (ring, cu), window = row, window if causal else None
    example = [number for number, length in enumerate(b - a for a, b in itertools.pairwise(cu)) for _ in range(length)]
    local = [[t for begin, end in mine for t in range(begin, end)] for mine in split_row(cu, ring).ranges]
    for ring_rank in range(ring):
        steps, found = ring_steps(cu, ring, ring_rank, causal=causal, window=window), set()
        for step in steps:
            queries, keys, shown = local[ring_rank], local[(ring_rank - step.behind) % ring], step.blocks
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
            for p in local[ring_rank]
            for s in range(cu[-1])
            if example[p] == example[s] and (not causal or s <= p) and (window is None or p - s < window)
        }


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 5), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from((1, 2)))
def test_transformer_engine_cuts_every_example_on_its_own(ranks, chunks, inner):
    """Token by token after Transformer Engine's documentation (tests/te_stand_in.py), with any order of exchanges between the ranks."""
    starts = list(itertools.accumulate((2 * ranks * inner * chunk for chunk in chunks), initial=0))
    expected = local(starts, ranks * inner)
    for rank in range(ranks * inner):
        assert local_tokens(starts, Mesh(inner, ranks, te=True), rank).tolist() == expected[rank]


def test_the_example_of_transformer_engines_documentation():
    """The example of thd_sequence_order_to_cp_rank_order: positions in their example, rank after rank."""
    starts, told = (
        (0, 8, 16, 24, 40),
        [
            [0, 7, 0, 7, 0, 7, 0, 1, 14, 15],
            [1, 6, 1, 6, 1, 6, 2, 3, 12, 13],
            [2, 5, 2, 5, 2, 5, 4, 5, 10, 11],
            [3, 4, 3, 4, 3, 4, 6, 7, 8, 9],
        ],
    )
    positions = torch.cat([torch.arange(stop - start) for start, stop in itertools.pairwise(starts)])
    for mesh in (Mesh(1, 4, te=True), Mesh(4, 1, te=True), Mesh(2, 2, te=True)):
        assert [positions[local_tokens(starts, mesh, rank)].tolist() for rank in range(4)] == told


def planned_slowly(cu: tuple[int, ...], ring: int, *, causal: bool, window: int | None) -> list[list[Step]]:
    """[ring rank][step], the definition: tries every example for every range, and every rank for every step."""
    local = []
    for mine in split_row(cu, ring).ranges:
        found, first = [], 0
        for begin, end in mine:
            for example, (start, stop) in enumerate(itertools.pairwise(cu)):
                low, high = max(begin, start), min(end, stop)
                last, here = found[-1] if found else None, first + low - begin
                if low < high and last and last.example == example and last.position + last.length == low - start:
                    found[-1] = Run(example, last.position, last.first, last.length + high - low)
                elif low < high:
                    found.append(Run(example, low - start, here, high - low))
            first += end - begin
        local.append(found)
    steps = [
        [
            Step(step, blocks(local[each], local[(each - step) % ring], causal=causal, window=window))
            for each in range(ring)
        ]
        for step in range(ring)
    ]
    needed = [some for some in steps if any(step.blocks for step in some)]
    return [[some[ring_rank] for some in needed] for ring_rank in range(ring)]


@settings(max_examples=400, deadline=None)
@given(rows(most=12), st.booleans(), st.none() | st.integers(1, 60))
def test_the_plan_of_one_position_is_that_of_all(row, causal, window):
    (ring, cu), window = row, window if causal else None
    expected = planned_slowly(cu, ring, causal=causal, window=window)
    found = [list(ring_steps(cu, ring, ring_rank, causal=causal, window=window)) for ring_rank in range(ring)]
    assert found == expected


def test_a_row_of_ten_thousand_examples() -> None:
    steps = ring_steps(tuple(range(0, 1_024_001, 100)), 64, 63)
    assert sum(work(step.blocks) for step in steps) == 160 * 100 * 101 // 2 and len(steps) == 1


def test_steps_that_nobody_needs_are_left_out() -> None:
    alone = tuple(range(0, 65, 8))  # examples of 8 tokens, chunks of 8: no rank sees another's keys
    assert [len(ring_steps(alone, 4, ring_rank)) for ring_rank in range(4)] == [1, 1, 1, 1]
    assert [step.behind for step in ring_steps((0, 64), 4, 0)] == [0, 1, 2, 3]
    # The neighbours of a chunk are on both sides of the ring.
    for window, expected in ((100, [0, 1, 7]), (400, [0, 1, 7]), (402, [0, 1, 2, 6, 7])):
        steps = ring_steps((0, 6400), 8, 1, window=window)
        assert [step.behind for step in steps] == expected
        assert all(work(step.blocks) <= 2 * window * window for step in steps[1:])


def test_zigzag_gives_every_position_the_same_work() -> None:
    done = [sum(work(step.blocks) for step in ring_steps((0, 4096), 4, ring_rank)) for ring_rank in range(4)]
    assert len(set(done)) == 1 and sum(done) == 4096 * 4097 // 2


def test_runs_join_what_lies_together() -> None:
    assert len(runs(((0, 4), (4, 8)), (0, 8))) == 1
    assert [run.length for run in runs(((0, 4), (6, 8)), (0, 3, 8))] == [3, 1, 2]
    assert blocks(runs(((0, 4),), (0, 8)), runs(((4, 8),), (0, 8)), causal=True, window=None) == ()
