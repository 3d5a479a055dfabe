"""Which tokens of a packed row a context rank has, and which keys of another rank its queries see. Arithmetic, the same on every rank.

The context axis is a mesh: Ulysses inside (neighbouring ranks), ring outside. parallel/split.py gives each ring rank its tokens, and its
Ulysses ranks have equal parts of them, one after another. After the Ulysses exchange a rank has all tokens of its ring rank and a share
of the heads. The ring passes keys and values on.

Transformer Engine's own context parallelism (`Mesh.te`) splits each example separately, zigzag over all context ranks.
"""

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swift_mega.ops.blocks import Block, block
from swift_mega.parallel.mesh import Mesh
from swift_mega.parallel.split import Range, Run, Split, join, split_row, zigzag


@dataclass(frozen=True)
class Step:
    """What the queries of a ring rank see of the keys of the ring rank `behind` places before it."""

    behind: int
    blocks: tuple[Block, ...]


def pieces(cu_seqlens: Sequence[int], mesh: Mesh, rank: int) -> tuple[Range, ...]:
    """Ranges of a row that a context rank has, in order. cu_seqlens: where the examples of the row begin, and its end."""
    if mesh.te:
        return tuple(
            (start + begin, start + end)
            for start, stop in itertools.pairwise(cu_seqlens)
            for begin, end in zigzag(stop - start, mesh.size, rank)
        )
    inner, ring_rank = mesh.place(rank)
    ranges = split_row(tuple(cu_seqlens), mesh.ring).ranges[ring_rank]
    share = sum(end - begin for begin, end in ranges) // mesh.ulysses
    first, last, passed, found = share * inner, share * (inner + 1), 0, []
    for begin, end in ranges:
        start, stop = max(first - passed, 0) + begin, min(last - passed, end - begin) + begin
        if start < stop:
            found.append((start, stop))
        passed += end - begin
    return tuple(found)


def runs(ranges: Sequence[Range], cu_seqlens: Sequence[int]) -> list[Run]:
    """The runs in these ranges of a row, split where an example ends. Runs that are adjacent in the example and on the rank are joined."""
    found: list[Run] = []
    first = 0
    for begin, end in ranges:
        for example in range(bisect_right(cu_seqlens, begin) - 1, bisect_left(cu_seqlens, end)):
            start, stop = cu_seqlens[example], cu_seqlens[example + 1]
            low, high = max(begin, start), min(end, stop)
            join(found, Run(example, low - start, first + low - begin, high - low))
        first += end - begin
    return found


def blocks(mine: Sequence[Run], theirs: Sequence[Run], *, causal: bool, window: int | None) -> tuple[Block, ...]:
    """What the queries of `mine` see of the keys of `theirs`. Blocks that are adjacent on both sides follow one another, so that
    `call_groups` can put them into one call.
    """
    by_example: dict[int, list[Run]] = {}
    for run in theirs:
        by_example.setdefault(run.example, []).append(run)
    chains: dict[tuple[int, int, bool], list[Block]] = {}
    order: list[list[Block]] = []
    for query in mine:
        for key in by_example.get(query.example, ()):
            shift = query.position - key.position
            for found in block(
                query.first, query.length, key.first, key.length, shift=shift, causal=causal, window=window
            ):
                chain = chains.pop((found.q, found.k, found.causal), None)
                if chain is None:
                    chain = []
                    order.append(chain)
                chain.append(found)
                chains[found.q + found.queries, found.k + found.keys, found.causal] = chain
    return tuple(itertools.chain.from_iterable(order))


@functools.lru_cache(maxsize=64)
def ring_steps(
    cu_seqlens: tuple[int, ...], ring: int, ring_rank: int, *, causal: bool = True, window: int | None = None
) -> tuple[Step, ...]:
    """What this ring rank sees of its own keys, then of the keys that come around the ring. The `behind` of each step is the same on all
    ranks.

    A distance at which no rank sees a key is skipped. With a window, or with examples much shorter than the row, that is most of them.
    """
    split = split_row(cu_seqlens, ring)
    mine = runs(split.ranges[ring_rank], cu_seqlens)
    steps = [Step(0, blocks(mine, mine, causal=causal, window=window))]
    for behind in _needed(split, causal=causal, window=window):
        ours, theirs = split.shared[ring_rank], split.shared[(ring_rank - behind) % ring]
        queries = [run for example in ours if example in theirs for run in ours[example]]
        keys = [run for example in ours for run in theirs.get(example, ())]
        queries.sort(key=lambda run: run.first)
        steps.append(Step(behind, blocks(queries, keys, causal=causal, window=window)))
    return tuple(steps)


def _needed(split: Split, *, causal: bool, window: int | None) -> list[int]:
    """The distances `behind`, above 0, at which some ring rank sees keys; in order."""
    ring, found = len(split.shared), {0}
    # For each example: (begin, end, ring rank) of its runs.
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    for ring_rank, shared in enumerate(split.shared):
        for example, own in shared.items():
            pieces.setdefault(example, []).extend((one.position, one.position + one.length, ring_rank) for one in own)
    for some in pieces.values():
        in_order = sorted(some)
        for number, (first, _, mine) in enumerate(in_order):
            for _, end, theirs in reversed(in_order[:number]) if causal else in_order:
                if causal and window is not None and first - end + 1 >= window:
                    break  # the first query of a run sees farthest back
                found.add((mine - theirs) % ring)
            if len(found) == ring:
                return sorted(found)[1:]
    return sorted(found)[1:]


def local_tokens(cu_seqlens: Sequence[int], mesh: Mesh, rank: int) -> torch.Tensor:
    """[tokens / size] int64: indices in the row of the tokens that a context rank has, in its order."""
    begin, end = torch.tensor(pieces(cu_seqlens, mesh, rank)).t()
    lengths = end - begin
    return torch.arange(int(lengths.sum())) + (begin - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
