"""Where every number of a rank's parameter comes from, for every pack at any sizes; and random cases of them for hypothesis.

The reference is index arithmetic after Megatron's own description of its linears, without reshape or concatenation, and shares nothing
with packs.py. Values are random bits, so NaNs with any payload and negative zeros occur; values are compared as bits.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from swift_mega.convert.slices import Slice, rows_of, slices
from swift_mega.models import packs
from swift_mega.models.family import Rule
from swift_mega.models.packs import Heads, Pack

Index = tuple[int, ...]
Source = tuple[int, Index]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)


# --- the reference


@dataclass(frozen=True)
class Sizes:
    """`size` ranks. `multiple`: groups, features or rows on each rank. `columns`: of a matrix, None for a vector."""

    size: int
    multiple: int
    queries: int
    head_dim: int
    columns: int | None
    missing: int
    """The rows to add to a vocabulary so that it has `size * multiple`."""
    within: int = 1
    """Ranks that share a group. Where it is 1, each rank has `multiple` whole groups."""

    @property
    def groups(self) -> int:
        """The number of groups over all ranks."""
        return self.size * self.multiple if self.within == 1 else self.size // self.within

    @property
    def channels(self) -> tuple[int, int, int]:
        """Query, key and value channels of a key head."""
        return self.head_dim, self.head_dim + 1, self.queries

    @property
    def tail(self) -> Index:
        return () if self.columns is None else (self.columns,)


@dataclass(frozen=True)
class Reference:
    """The parts have the whole shapes `parts`. A rank's parameter has `local_shape`, and its number at an index is that of `source`."""

    parts: tuple[Index, ...]
    local_shape: Index
    source: Callable[[int, Index], Source | None]
    """(rank, index in the parameter) -> (part, index in it). None: a zero that is in no tensor."""
    together: int | None = None
    """The dim along which the parts are concatenated in a single tensor. None: each part is a tensor."""

    @property
    def tensors(self) -> list[Index]:
        """Shapes of the Hugging Face tensors."""
        if self.together is None:
            return list(self.parts)
        shape = list(self.parts[0])
        shape[self.together] = sum(part[self.together] for part in self.parts)
        return [tuple(shape)]

    def place(self, source: Source) -> Source:
        """The Hugging Face tensor of a number of a part, and the index in it."""
        part, index = source
        if self.together is None:
            return part, index
        before = sum(self.parts[number][self.together] for number in range(part))
        return 0, tuple(i + before * (dim == self.together) for dim, i in enumerate(index))

    def numbers(self, rank: int) -> Iterator[tuple[Index, Source | None]]:
        """Every index of a rank's parameter, with the tensor and index that its number comes from."""
        for index in itertools.product(*map(range, self.local_shape)):
            source = self.source(rank, index)
            yield index, None if source is None else self.place(source)


def qkv_source(s: Sizes, row: int) -> tuple[int, int]:
    """(0 query | 1 key | 2 value, its row) of a row of all ranks' linear_qkv, of which each rank has an even share: [group, (queries,
    key, value), head_dim], as get_query_key_value_tensors in transformer/attention.py splits it."""
    group, inside = divmod(row, (s.queries + 2) * s.head_dim)
    head, feature = divmod(inside, s.head_dim)
    if head < s.queries:
        return 0, (group * s.queries + head) * s.head_dim + feature
    return head - s.queries + 1, group * s.head_dim + feature


def gated_source(s: Sizes, row: int) -> tuple[int, int]:
    """As qkv_source, with a gate for every query. linear_qkv has the gates after all queries of the group; the tensor has each head's
    query and then its gate."""
    group, inside = divmod(row, (2 * s.queries + 2) * s.head_dim)
    slot, feature = divmod(inside, s.head_dim)
    if slot < 2 * s.queries:
        gate, head = divmod(slot, s.queries)
        return 0, ((group * s.queries + head) * 2 + gate) * s.head_dim + feature
    return slot - 2 * s.queries + 1, group * s.head_dim + feature


def channels_source(s: Sizes, row: int) -> tuple[int, int]:
    """For each key head: its query channels, its key channels, its value channels."""
    head, inside = divmod(row, sum(s.channels))
    part = 0
    while inside >= s.channels[part]:
        inside -= s.channels[part]
        part += 1
    return part, head * s.channels[part] + inside


def by_group(s: Sizes, each: Index, source_of: Callable[[Sizes, int], tuple[int, int]]) -> Reference:
    """Groups one after another, with `each` rows of every part. Ranks have even shares of all rows."""
    held = s.groups * sum(each) // s.size

    def source(rank: int, index: Index) -> Source:
        part, row = source_of(s, rank * held + index[0])
        return part, (row, *index[1:])

    return Reference(tuple((s.groups * rows, *s.tail) for rows in each), (held, *s.tail), source)


def qkv(s: Sizes) -> Reference:
    return by_group(s, (s.queries * s.head_dim, s.head_dim, s.head_dim), qkv_source)


def gated(s: Sizes) -> Reference:
    return by_group(s, (2 * s.queries * s.head_dim, s.head_dim, s.head_dim), gated_source)


def by_key_head(s: Sizes) -> Reference:
    return by_group(s, s.channels, channels_source)


def gate_up(s: Sizes) -> Reference:
    """A rank's rows of gate, then its rows of up (transformer/mlp.py splits the output of fc1 into two chunks)."""

    def source(rank: int, index: Index) -> Source:
        part, row = divmod(index[0], s.multiple)
        return part, (rank * s.multiple + row, *index[1:])

    return Reference(((s.size * s.multiple, *s.tail),) * 2, (2 * s.multiple, *s.tail), source)


def interleaved(s: Sizes) -> Reference:
    """Column 2f of [in, 2 * ffn] is the gate of feature f, and column 2f + 1 its up. In a vector they are its numbers."""

    def source(rank: int, index: Index) -> Source:
        up, row = divmod(index[0], s.multiple)
        return 0, (*index[1:], 2 * (rank * s.multiple + row) + up)

    return Reference(((*s.tail, 2 * s.size * s.multiple),), (2 * s.multiple, *s.tail), source)


def even(s: Sizes, dim: int) -> Reference:
    """The rank's even share of one dim, and all of the other dim."""
    share, other = s.multiple, s.tail
    whole, held = (
        ((s.size * share, *other), (share, *other)) if dim == 0 else ((*other, s.size * share), (*other, share))
    )

    def source(rank: int, index: Index) -> Source:
        return 0, tuple(i + rank * share * (number == dim) for number, i in enumerate(index))

    return Reference((whole,), held, source)


def vocabulary(s: Sizes) -> Reference:
    """Rows in the order of the ranks, and zeros after the last one. The last ranks may have zeros only."""
    rows = s.size * s.multiple - s.missing
    share = -(-rows // s.size)

    def source(rank: int, index: Index) -> Source | None:
        row = rank * share + index[0]
        return (0, (row, *index[1:])) if row < rows else None

    return Reference(((rows, *s.tail),), (share, *s.tail), source)


def same(s: Sizes) -> Reference:
    shape = (s.multiple, *s.tail)
    return Reference((shape,), shape, lambda rank, index: (0, index))


def one_row(s: Sizes) -> Reference:
    return Reference(((1, s.multiple),), (s.multiple,), lambda rank, index: (0, (0, *index)))


def transposed(inner: Reference) -> Reference:
    """As the given reference, with all tensors transposed to [in, out]."""

    def source(rank: int, index: Index) -> Source | None:
        found = inner.source(rank, index)
        return None if found is None else (found[0], found[1][::-1])

    dim = None if inner.together is None else 1 - inner.together
    return Reference(tuple(part[::-1] for part in inner.parts), inner.local_shape, source, dim)


def fused(inner: Reference) -> Reference:
    return replace(inner, together=0)


def per_head(s: Sizes, heads: int) -> Reference:
    """One tensor [head_dim] for each head. A rank's parameter has those of its own heads as rows."""
    share = heads // s.size
    parts = ((s.head_dim,),) * heads
    return Reference(parts, (share, s.head_dim), lambda rank, index: (rank * share + index[0], index[1:]))


MATRIX, VECTOR = "matrix", "vector"
REFERENCES: dict[Pack, tuple[Callable[[Sizes], Reference], tuple[str, ...]]] = {
    packs.COLUMN: (lambda s: even(s, 0), (MATRIX, VECTOR)),
    packs.ROW: (lambda s: even(s, 1), (MATRIX,)),
    packs.REPLICATED: (same, (MATRIX, VECTOR)),
    packs.ONE_ROW: (one_row, (VECTOR,)),
    packs.PER_QUERY_HEAD: (lambda s: per_head(s, s.groups * s.queries), (VECTOR,)),
    packs.PER_KEY_HEAD: (lambda s: per_head(s, s.groups), (VECTOR,)),
    packs.VOCAB: (vocabulary, (MATRIX, VECTOR)),
    packs.GATE_UP: (gate_up, (MATRIX, VECTOR)),
    packs.QKV: (qkv, (MATRIX, VECTOR)),
    packs.GATED_QKV: (gated, (MATRIX, VECTOR)),
    packs.FUSED_BY_KEY_HEAD: (lambda s: fused(by_key_head(s)), (MATRIX, VECTOR)),
    packs.FUSED_GATE_UP: (lambda s: fused(gate_up(s)), (MATRIX, VECTOR)),
    packs.FUSED_QKV: (lambda s: fused(qkv(s)), (MATRIX, VECTOR)),
    packs.INTERLEAVED_GATE_UP: (interleaved, (MATRIX,)),
    packs.INTERLEAVED_GATE_UP_BIAS: (interleaved, (VECTOR,)),
    packs.TRANSPOSED_COLUMN: (lambda s: transposed(even(s, 0)), (MATRIX,)),
    packs.TRANSPOSED_ROW: (lambda s: transposed(even(s, 1)), (MATRIX,)),
    packs.TRANSPOSED_FUSED_QKV: (lambda s: transposed(fused(qkv(s))), (MATRIX,)),
}
"""Every pack, its reference, and the tensors it is used for."""
WITHIN = (packs.QKV, packs.FUSED_QKV)
"""Packs whose groups may be shared by ranks."""


# --- cases


@dataclass(frozen=True)
class Case:
    """A pack at some sizes, with the whole Hugging Face tensors."""

    pack: Pack
    sizes: Sizes
    reference: Reference
    tensors: list[Tensor]

    def heads(self, rank: int) -> Heads:
        """The heads that the rank's join and split get."""
        return self.model_heads.on(rank, self.sizes.size)

    @property
    def model_heads(self) -> Heads:
        s = self.sizes
        return Heads(s.queries, s.head_dim, groups=s.groups, channels=s.channels)

    @property
    def rule(self) -> Rule:
        return Rule("parameter", tuple(f"tensor{number}" for number in range(len(self.tensors))), self.pack)

    def expected(self, rank: int) -> Tensor:
        """The rank's parameter, number by number, as bits."""
        bits = [as_bits(tensor).tolist() for tensor in self.tensors]
        numbers = []
        for _, place in self.reference.numbers(rank):
            value: Any = 0
            if place is not None:
                value = bits[place[0]]
                for i in place[1]:
                    value = value[i]
            numbers.append(value)
        return torch.tensor(numbers, dtype=as_bits(self.tensors[0]).dtype).reshape(self.reference.local_shape)

    def slices(self, rank: int) -> list[tuple[int, Slice]]:
        """The slices of every tensor that the rank reads, in order."""
        numbers = {name: number for number, name in enumerate(self.rule.parts)}
        tensors = {name: tuple(self.tensors[number].shape) for name, number in numbers.items()}
        rank_size = (rank, self.sizes.size)
        found = slices(
            self.rule, tensors, rank_size=rank_size, heads=self.model_heads, rows=rows_of(self.reference.local_shape)
        )
        return [(numbers[piece.name], piece) for piece in found]

    def read(self, rank: int) -> list[Tensor]:
        return [cut(self.tensors[number], piece) for number, piece in self.slices(rank)]

    def local(self, rank: int) -> Tensor:
        """The rank's parameter from the reference, in the tensors' dtype."""
        return self.expected(rank).view(self.tensors[0].dtype)


def cut(tensor: Tensor, piece: Slice) -> Tensor:
    if piece.axis is None:
        return tensor
    assert piece.stop is not None
    return tensor.narrow(piece.axis, piece.start, piece.stop - piece.start)


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def equal(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(as_bits(found), as_bits(expected))


def random_bits(shape: Index, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    limits = torch.iinfo(BITS[dtype.itemsize])
    return torch.randint(limits.min, limits.max + 1, shape, dtype=BITS[dtype.itemsize], generator=generator).view(dtype)


def make(pack: Pack, sizes: Sizes, dtype: torch.dtype, seed: int) -> Case:
    reference, generator = REFERENCES[pack][0](sizes), torch.Generator().manual_seed(seed)
    return Case(pack, sizes, reference, [random_bits(shape, dtype, generator) for shape in reference.tensors])


@st.composite
def cases(draw: st.DrawFn, pack: Pack) -> Case:
    size, multiple = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = Sizes(
        size=size,
        multiple=multiple,
        queries=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 4)),
        columns=draw(st.integers(1, 5)) if draw(st.sampled_from(REFERENCES[pack][1])) == MATRIX else None,
        missing=draw(st.integers(0, size * multiple - 1)),
    )
    if pack in WITHIN and draw(st.booleans()):  # more ranks than groups: the rows of a group are sharded
        within = draw(st.integers(2, 4))
        sizes = replace(
            sizes, size=within * draw(st.integers(1, 2)), head_dim=within * draw(st.integers(1, 2)), within=within
        )
    return make(pack, sizes, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1 << 30)))
