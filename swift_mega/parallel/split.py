"""Which tokens of a packed row each ring rank holds: as many on each, with equal causal work. Arithmetic, the same on every rank.

A long example is split into 2 * ring pieces. Ring rank p holds pieces p and 2 * ring - 1 - p (zigzag), so causal work is equal:

    ring rank        0                1                2                3
    pieces           0, 7             1, 6             2, 5             3, 4

An example that is short compared with a rank's share stays whole. Whole examples are dealt out by length, and their keys are sent nowhere.
Where a rank's share is full, its last example continues on the next rank. The pieces of an example differ by one token where 2 * ring
does not divide its length, and the longer pieces are chosen so that all ranks stay even. So examples may have any length, and only the
row is padded.
"""

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Range = tuple[int, int]
# An example, and a range of the row within it.
Piece = tuple[int, int, int]

# Good enough: work of the busiest ring rank over the mean.
MAX_IMBALANCE = 1.05
# In a layer, everything but attention takes as long per token as attending to this many keys, at the least. Counted in products it would
# be 6 x hidden size keys.
LAYER_COST_IN_KEYS = 1024
# Fewest tokens of a piece of an example that is split only for the sake of balance.
MIN_PIECE_TOKENS = 16


@dataclass(frozen=True)
class Run:
    """`length` consecutive tokens of one example, from its token `position` on. On this rank the first of them has index `first`."""

    example: int
    position: int
    first: int
    length: int


@dataclass(frozen=True)
class Split:
    """How a packed row is split over the ranks of a ring."""

    ranges: tuple[tuple[Range, ...], ...]
    """For each ring rank: the ranges of the row that it holds, in its order."""
    shared: tuple[dict[int, list[Run]], ...]
    """For each ring rank: its runs of the examples that other ring ranks hold too, by example."""


def zigzag(tokens: int, ring: int, ring_rank: int) -> tuple[Range, ...]:
    """The two ranges of `tokens` that a ring rank holds: pieces p and 2 * ring - 1 - p of 2 * ring equal ones, p = `ring_rank`.

    tokens: a multiple of 2 * ring where ring > 1.
    """
    if ring == 1:
        return ((0, tokens),)
    assert tokens % (2 * ring) == 0, (tokens, ring)
    chunk = tokens // (2 * ring)
    return tuple((number * chunk, (number + 1) * chunk) for number in (ring_rank, 2 * ring - 1 - ring_rank))


@functools.lru_cache(maxsize=64)
def split_row(cu_seqlens: tuple[int, ...], ring: int) -> Split:
    """Splits a packed row over a ring. cu_seqlens: where its examples begin, and its end, a multiple of 2 * ring where ring > 1."""
    if ring == 1:
        return Split((((0, cu_seqlens[-1]),),), ({},))
    assert cu_seqlens[-1] % (2 * ring) == 0, (cu_seqlens[-1], ring)
    examples = list(itertools.pairwise(cu_seqlens))
    best, pieces = float("inf"), list[list[Piece]]()
    for most in _limits(examples, ring):
        found = _share_out(examples, ring, most)
        uneven = _unevenness(cu_seqlens, found)
        if uneven < best:
            best, pieces = uneven, found
        if best <= MAX_IMBALANCE:
            break
    return Split(tuple(tuple((start, stop) for _, start, stop in mine) for mine in pieces), _shared(cu_seqlens, pieces))


def _limits(examples: Sequence[Range], ring: int) -> Iterator[int]:
    """Lengths up to which examples may stay whole: a rank's share, then half of that and so on, where this splits more examples."""
    lengths = [stop - start for start, stop in examples]
    most, split = sum(lengths) // ring, -1
    while split < 0 or most >= 2 * ring * MIN_PIECE_TOKENS:
        longer = sum(length > most for length in lengths)
        if longer > split:
            yield most
        most, split = most // 2, longer


def _share_out(examples: Sequence[Range], ring: int, most: int) -> list[list[Piece]]:
    """What each ring rank holds, in order: its first pieces of the examples longer than `most`, its second pieces of them, whole
    examples.
    """
    firsts: list[list[Piece]] = [[] for _ in range(ring)]
    seconds: list[list[Piece]] = [[] for _ in range(ring)]
    sizes, whole = [0] * ring, []
    for example, (start, stop) in enumerate(examples):
        if stop - start <= most:
            whole.append((stop - start, example, start))
            continue
        for number, piece in enumerate(_pieces_of(start, stop, ring, sizes)):
            ring_rank, into = (number, firsts) if number < ring else (2 * ring - 1 - number, seconds)
            if piece[0] < piece[1]:
                into[ring_rank].append((example, *piece))
    room = [sum(stop - start for start, stop in examples) // ring - size for size in sizes]
    for mine, rest, others in zip(firsts, seconds, _whole(whole, room), strict=True):
        mine += rest + others
    return firsts


def _pieces_of(start: int, stop: int, ring: int, sizes: list[int]) -> list[Range]:
    """2 * ring consecutive pieces. sizes: tokens of each ring rank so far, updated here; they differ by at most one, before and after."""
    least, more = divmod(stop - start, 2 * ring)
    lengths = [least] * (2 * ring)
    order = sorted(range(ring), key=sizes.__getitem__)
    for number in range(more):
        ring_rank = order[number % ring]
        lengths[ring_rank if number < ring else 2 * ring - 1 - ring_rank] += 1
    for ring_rank in range(ring):
        sizes[ring_rank] += lengths[ring_rank] + lengths[2 * ring - 1 - ring_rank]
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=start)))


def _whole(lengths: list[tuple[int, int, int]], room: Sequence[int]) -> list[list[Piece]]:
    """Deals out whole examples, the longest first, to the ring rank that has the least tokens and work. Then what exceeds the room of a
    rank moves on to the next rank.

    lengths: (tokens, example, its first token in the row) of each. room: tokens that each rank can still take.
    """
    groups: list[list[tuple[int, int, int]]] = [[] for _ in room]
    tokens, pairs = (max(1, sum(one[0] ** power for one in lengths)) for power in (1, 2))
    least = [(0.0, ring_rank) for ring_rank in range(len(room))]
    for one in sorted(lengths, key=lambda one: (-one[0], one[1])):
        so_far, ring_rank = heapq.heappop(least)
        groups[ring_rank].append(one)
        heapq.heappush(least, (so_far + one[0] / tokens + one[0] ** 2 / pairs, ring_rank))
    found: list[list[Piece]] = [[] for _ in room]
    ring_rank, left = 0, room[0]
    for group in groups:
        # Short examples are at both ends, because those may be split.
        for length, example, start in group[1::2][::-1] + group[::2]:
            stop = start + length
            while start < stop:
                while not left:
                    ring_rank += 1
                    left = room[ring_rank]
                taken = min(left, stop - start)
                found[ring_rank].append((example, start, start + taken))
                start, left = start + taken, left - taken
    for mine in found:
        mine.sort()
    return found


def _unevenness(cu_seqlens: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> float:
    """Work of a layer on the busiest ring rank over the mean. The unit is one pair of a query and a key that it sees."""
    pairs = [0] * len(pieces)
    for ring_rank, mine in enumerate(pieces):
        for example, start, stop in mine:
            before, length = start - cu_seqlens[example], stop - start
            pairs[ring_rank] += length * before + length * (length + 1) // 2
    rest = LAYER_COST_IN_KEYS * cu_seqlens[-1] / len(pieces)
    return (max(pairs) + rest) / (sum(pairs) / len(pieces) + rest)


def _shared(cu_seqlens: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> tuple[dict[int, list[Run]], ...]:
    found: list[dict[int, list[Run]]] = []
    for mine in pieces:
        first, here = 0, dict[int, list[Run]]()
        for example, start, stop in mine:
            begin = cu_seqlens[example]
            if (start, stop) != (begin, cu_seqlens[example + 1]):
                join(here.setdefault(example, []), Run(example, start - begin, first, stop - start))
            first += stop - start
        found.append(here)
    return tuple(found)


def join(found: list[Run], run: Run) -> None:
    """Appends a run, or extends the last run if the two are adjacent both in the example and on this rank."""
    last = found[-1] if found else None
    if (
        last
        and last.example == run.example
        and last.position + last.length == run.position
        and last.first + last.length == run.first
    ):
        found[-1] = Run(run.example, last.position, last.first, last.length + run.length)
    else:
        found.append(run)
