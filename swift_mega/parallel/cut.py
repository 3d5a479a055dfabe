"""Which tokens of a row each position of a ring holds: as many on each, and causal work alike; arithmetic, the same on every rank.

A long example is cut in two pieces for each position, as far from its middle as each other, so that all have the same work of it:

    position         0                1                2                3
    pieces           0, 7             1, 6             2, 5             3, 4       (zigzag)

Examples that are short beside a position's share stay whole, dealt out by length, and their keys are sent nowhere; where a share is full
its last one goes on at the next position. Pieces of an example differ by a token where 2 * ring does not divide it, and which ones get it
keeps the positions even, so examples have any length and only the row is padded.
"""

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Range = tuple[int, int]
Piece = tuple[int, int, int]  # an example and a range of the row within it

EVEN = 1.05  # work of the slowest position over the mean: good enough
TOKEN = (
    1024  # keys that take as long as the rest of a layer for one token, at the least: 6 x hidden size by the products
)
SMALLEST = 16  # tokens of a piece of an example that is cut for the sake of balance alone


@dataclass(frozen=True)
class Run:
    """Tokens of one example that lie together: `length` of them, from `position` of the example on; the first is `first` here."""

    example: int
    position: int
    first: int
    length: int


@dataclass(frozen=True)
class Cut:
    """A row on the positions of a ring."""

    held: tuple[tuple[Range, ...], ...]
    """Ranges of the row that a position holds, in its order."""
    shared: tuple[dict[int, list[Run]], ...]
    """What a position holds of the examples that others hold too."""


def zigzag(tokens: int, ring: int, position: int) -> tuple[Range, ...]:
    """Two ranges of `tokens`, a multiple of 2 * ring, as far from the middle as each other."""
    if ring == 1:
        return ((0, tokens),)
    assert tokens % (2 * ring) == 0, (tokens, ring)
    chunk = tokens // (2 * ring)
    return tuple((number * chunk, (number + 1) * chunk) for number in (position, 2 * ring - 1 - position))


@functools.lru_cache(maxsize=64)
def cut_row(cu_seqlens: tuple[int, ...], ring: int) -> Cut:
    """cu_seqlens: where the examples of a row begin, and its end, a multiple of 2 * ring where there is a ring."""
    if ring == 1:
        return Cut((((0, cu_seqlens[-1]),),), ({},))
    assert cu_seqlens[-1] % (2 * ring) == 0, (cu_seqlens[-1], ring)
    examples = list(itertools.pairwise(cu_seqlens))
    best, held = float("inf"), list[list[Piece]]()
    for most in _limits(examples, ring):
        found = _share_out(examples, ring, most)
        uneven = _unevenness(cu_seqlens, found)
        if uneven < best:
            best, held = uneven, found
        if best <= EVEN:
            break
    return Cut(tuple(tuple((start, stop) for _, start, stop in mine) for mine in held), _shared(cu_seqlens, held))


def _limits(examples: Sequence[Range], ring: int) -> Iterator[int]:
    """Up to which length examples stay whole: a position's share, then less as long as that cuts more of them."""
    lengths = [stop - start for start, stop in examples]
    most, cut = sum(lengths) // ring, -1
    while cut < 0 or most >= 2 * ring * SMALLEST:
        longer = sum(length > most for length in lengths)
        if longer > cut:
            yield most
        most, cut = most // 2, longer


def _share_out(examples: Sequence[Range], ring: int, most: int) -> list[list[Piece]]:
    """What each position holds: of examples longer than `most` the first pieces and then the second ones, and whole ones."""
    firsts: list[list[Piece]] = [[] for _ in range(ring)]
    seconds: list[list[Piece]] = [[] for _ in range(ring)]
    sizes, whole = [0] * ring, []
    for example, (start, stop) in enumerate(examples):
        if stop - start <= most:
            whole.append((stop - start, example, start))
            continue
        for number, piece in enumerate(_pieces_of(start, stop, ring, sizes)):
            position, into = (number, firsts) if number < ring else (2 * ring - 1 - number, seconds)
            if piece[0] < piece[1]:
                into[position].append((example, *piece))
    room = [sum(stop - start for start, stop in examples) // ring - size for size in sizes]
    for mine, rest, others in zip(firsts, seconds, _whole(whole, room), strict=True):
        mine += rest + others
    return firsts


def _pieces_of(start: int, stop: int, ring: int, sizes: list[int]) -> list[Range]:
    """2 * ring pieces, one after another. sizes: tokens of each position so far, which differ by one at most, as they do afterwards."""
    least, more = divmod(stop - start, 2 * ring)
    lengths = [least] * (2 * ring)
    order = sorted(range(ring), key=sizes.__getitem__)
    for number in range(more):
        position = order[number % ring]
        lengths[position if number < ring else 2 * ring - 1 - position] += 1
    for position in range(ring):
        sizes[position] += lengths[position] + lengths[2 * ring - 1 - position]
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=start)))


def _whole(lengths: list[tuple[int, int, int]], room: Sequence[int]) -> list[list[Piece]]:
    """Dealt out, the longest first, to the position that has least tokens and work; then moved on where there is more than room.

    lengths: (tokens, example, its first token in the row) of each.
    """
    groups: list[list[tuple[int, int, int]]] = [[] for _ in room]
    tokens, pairs = (max(1, sum(one[0] ** power for one in lengths)) for power in (1, 2))
    least = [(0.0, position) for position in range(len(room))]
    for one in sorted(lengths, key=lambda one: (-one[0], one[1])):
        so_far, position = heapq.heappop(least)
        groups[position].append(one)
        heapq.heappush(least, (so_far + one[0] / tokens + one[0] ** 2 / pairs, position))
    found: list[list[Piece]] = [[] for _ in room]
    position, left = 0, room[0]
    for group in groups:
        for length, example, start in group[1::2][::-1] + group[::2]:  # short ones at both ends, where they may be cut
            stop = start + length
            while start < stop:
                while not left:
                    position += 1
                    left = room[position]
                taken = min(left, stop - start)
                found[position].append((example, start, start + taken))
                start, left = start + taken, left - taken
    for mine in found:
        mine.sort()
    return found


def _unevenness(cu_seqlens: Sequence[int], held: Sequence[Sequence[Piece]]) -> float:
    """Work of a layer, in pairs of a query and a key that it sees: of the position that has most, over the mean."""
    pairs = [0] * len(held)
    for position, mine in enumerate(held):
        for example, start, stop in mine:
            before, length = start - cu_seqlens[example], stop - start
            pairs[position] += length * before + length * (length + 1) // 2
    rest = TOKEN * cu_seqlens[-1] / len(held)
    return (max(pairs) + rest) / (sum(pairs) / len(held) + rest)


def _shared(cu_seqlens: Sequence[int], held: Sequence[Sequence[Piece]]) -> tuple[dict[int, list[Run]], ...]:
    found: list[dict[int, list[Run]]] = []
    for mine in held:
        first, here = 0, dict[int, list[Run]]()
        for example, start, stop in mine:
            begin = cu_seqlens[example]
            if (start, stop) != (begin, cu_seqlens[example + 1]):
                join(here.setdefault(example, []), Run(example, start - begin, first, stop - start))
            first += stop - start
        found.append(here)
    return tuple(found)


def join(found: list[Run], run: Run) -> None:
    """Appends a run, to the last one where both lie together in the example and here."""
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
