"""Which tokens of a row a context rank holds, and what its queries see of another rank's keys; arithmetic, the same on every rank.

A row of examples is cut as a row, not example by example, so an example may have any length and only the row is padded. The context axis
is a mesh, Ulysses inside (neighbouring ranks) and ring outside:

    ring position    0                1                2                3
    chunks of row    0, 7             1, 6             2, 5             3, 4       (zigzag: causal work is alike)
    Ulysses rank     first, second half of those chunks, one after another

After the Ulysses exchange a rank has all tokens of its ring position and a share of the heads; the ring passes keys and values on.

Transformer Engine's own context parallelism cuts otherwise (`Mesh.engine`): each example as a ring would cut a row of it alone.
"""

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swift_mega.ops.blocks import Block, block
from swift_mega.parallel.mesh import Mesh

Range = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """What a ring position's queries see of the keys of the position `behind` before it."""

    behind: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Run:
    """Tokens of one example that lie together: `length` of them, from `position` of the example on; the first is `first` here."""

    example: int
    position: int
    first: int
    length: int


def ring_pieces(tokens: int, ring: int, position: int) -> tuple[Range, ...]:
    """Ranges of a row of `tokens` that a ring position holds, in order: two chunks as far from the middle as each other."""
    if ring == 1:
        return ((0, tokens),)
    assert tokens % (2 * ring) == 0, (tokens, ring)
    chunk = tokens // (2 * ring)
    return tuple((number * chunk, (number + 1) * chunk) for number in (position, 2 * ring - 1 - position))


def pieces(cu_seqlens: Sequence[int], mesh: Mesh, rank: int) -> tuple[Range, ...]:
    """Ranges of a row that a context rank holds, in order. cu_seqlens: where its examples begin, and its end."""
    if mesh.engine:
        return tuple(
            (start + begin, start + end)
            for start, stop in itertools.pairwise(cu_seqlens)
            for begin, end in ring_pieces(stop - start, mesh.size, rank)
        )
    inner, position = mesh.place(rank)
    held = ring_pieces(cu_seqlens[-1], mesh.ring, position)
    share = sum(end - begin for begin, end in held) // mesh.ulysses
    first, last, passed, found = share * inner, share * (inner + 1), 0, []
    for begin, end in held:
        start, stop = max(first - passed, 0) + begin, min(last - passed, end - begin) + begin
        if start < stop:
            found.append((start, stop))
        passed += end - begin
    return tuple(found)


def runs(held: Sequence[Range], cu_seqlens: Sequence[int], only: Sequence[int] | None = None) -> list[Run]:
    """What lies in ranges of a row, example by example (just those of `only`); neighbours in both are one."""
    found: list[Run] = []
    first = 0
    for begin, end in held:
        inside = range(bisect_right(cu_seqlens, begin) - 1, bisect_left(cu_seqlens, end)) if only is None else only
        for example in inside:
            start, stop = cu_seqlens[example], cu_seqlens[example + 1]
            low, high = max(begin, start), min(end, stop)
            if low >= high:
                continue
            last, here = found[-1] if found else None, first + low - begin
            if (
                last
                and last.example == example
                and last.position + last.length == low - start
                and last.first + last.length == here
            ):
                found[-1] = Run(example, last.position, last.first, last.length + high - low)
            else:
                found.append(Run(example, low - start, here, high - low))
        first += end - begin
    return found


def blocks(mine: Sequence[Run], theirs: Sequence[Run], *, causal: bool, window: int | None) -> tuple[Block, ...]:
    """What the queries of `mine` see of the keys of `theirs`."""
    by_example: dict[int, list[Run]] = {}
    for run in theirs:
        by_example.setdefault(run.example, []).append(run)
    return tuple(
        found
        for query in mine
        for key in by_example.get(query.example, ())
        for found in block(
            query.first,
            query.length,
            key.first,
            key.length,
            shift=query.position - key.position,
            causal=causal,
            window=window,
        )
    )


@functools.lru_cache(maxsize=64)
def ring_steps(
    cu_seqlens: tuple[int, ...], ring: int, position: int, *, causal: bool = True, window: int | None = None
) -> tuple[Step, ...]:
    """What this position sees of its own keys, then of those that come round the ring; `behind` is the same on every position.

    Positions from which nobody sees a key are passed over: with a window, or examples that are short beside the row, most of them.
    """
    mine = runs(ring_pieces(cu_seqlens[-1], ring, position), cu_seqlens)
    steps = [Step(0, blocks(mine, mine, causal=causal, window=window))]
    spread = _spread(cu_seqlens, ring) if ring > 1 else set()
    shared = [run for run in mine if run.example in spread]  # few: others hold nothing of the rest
    examples = sorted({run.example for run in shared})
    for behind in _needed(cu_seqlens, ring, spread, causal=causal, window=window):
        theirs = runs(ring_pieces(cu_seqlens[-1], ring, (position - behind) % ring), cu_seqlens, examples)
        steps.append(Step(behind, blocks(shared, theirs, causal=causal, window=window)))
    return tuple(steps)


def _spread(cu_seqlens: Sequence[int], ring: int) -> set[int]:
    """Examples that lie in more than one chunk of the row: less than there are chunks."""
    chunk = cu_seqlens[-1] // (2 * ring)
    at = {cut: bisect_right(cu_seqlens, cut) - 1 for cut in range(chunk, 2 * ring * chunk, chunk)}
    return {example for cut, example in at.items() if cu_seqlens[example] < cut}


def _needed(cu_seqlens: Sequence[int], ring: int, spread: set[int], *, causal: bool, window: int | None) -> list[int]:
    """How far behind keys lie that some position needs, but for its own. A query sees the chunk before its own, and further ones in a
    window."""
    chunk, found = cu_seqlens[-1] // (2 * ring), {0}
    reach = 2 * ring if window is None else (window - 2) // chunk + 1 if window > 1 else 0
    for example in spread:
        first, last = cu_seqlens[example] // chunk, (cu_seqlens[example + 1] - 1) // chunk
        for query in range(first, last + 1):
            for key in range(max(first, query - reach), (query if causal else last) + 1):
                mine, theirs = (min(number, 2 * ring - 1 - number) for number in (query, key))
                found.add((mine - theirs) % ring)
            if len(found) == ring:
                break
    return sorted(found)[1:]


def held_tokens(cu_seqlens: Sequence[int], mesh: Mesh, rank: int) -> torch.Tensor:
    """[tokens / size] int64: places in the row of the tokens that a context rank holds, in its order."""
    return torch.cat([torch.arange(begin, end) for begin, end in pieces(cu_seqlens, mesh, rank)])
