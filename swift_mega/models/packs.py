"""How the Hugging Face tensors of one Megatron parameter are laid out in it.

A Pack sees tensors and never a rank. Tensor parallelism shards every Hugging Face tensor along the same dim (`axis`). If all parts are the
same fraction of their whole tensors, `join` of the parts is that fraction of the Megatron parameter: join(shards) == shard of join(wholes).
So `join` makes a rank's parameter from shards, `split` is its inverse, and neither needs the number of ranks. The same Pack serves weight
and bias, and the `up` factor of an adapter on that linear.

There is one exception. With more tensor ranks than key heads, Megatron shards the rows of a joined QKV within a group, and a rank has some
rows of query, key or value, or none of one of them. `Heads.on` takes the rank, and `Pack.rows` says which rows it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Sizes of a fused attention projection: query heads per key head, and features per head."""

    queries_per_group: int
    head_dim: int
    groups: int = 0
    """Key heads of the whole model, each with its query heads; 0 where every rank has whole groups anyway."""
    share: tuple[int, int] = (0, 1)
    """(rank, size): which shard the tensors are, where ranks have parts of a group; else (0, 1)."""
    place: tuple[int, int] = (0, 1)
    """(rank, size) of the tensor rank that the tensors belong to."""
    channels: tuple[int, ...] = ()
    """Query, key and value channels of one key head of a gated delta net."""

    def on(self, rank: int, size: int) -> "Heads":
        """The same for the tensors of tensor rank `rank` of `size`."""
        return replace(self, place=(rank, size), share=self.share if self.groups % size == 0 else (rank, size))

    @property
    def rows(self) -> tuple[tuple[int, int], ...] | None:
        """(begin, end) of the rows of query, of key and of value that this share has; None where it has whole groups.

        The joined tensor is [groups, queries_per_group + 2, head_dim], flattened to rows and sharded evenly. The size is a multiple of the
        groups, so all rows of a rank belong to one group (megatron/core/transformer/attention.py, get_query_key_value_tensors).
        """
        rank, size = self.share
        if size == 1:
            return None
        parts = (self.queries_per_group * self.head_dim, self.head_dim, self.head_dim)
        each = self.groups * sum(parts) // size
        group, first = divmod(rank * each, sum(parts))
        found, before = [], 0
        for part in parts:
            start, stop = (min(max(row - before, 0), part) for row in (first, first + each))
            found.append((group * part + start, group * part + stop))
            before += part
        return tuple(found)


@dataclass(frozen=True)
class Pack:
    """One Hugging Face tensor, unchanged; sharded along `axis`, or whole on every rank (None).

    `padded`: the sharded dim is padded with zero rows until the tensor size divides it (vocabularies).
    """

    axis: int | None = None
    padded: bool = False

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """The Megatron tensor of `parts`, which are all whole, or all the same fraction along `axis`."""
        (part,) = parts
        return part

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        """Inverse of `join`; views where possible."""
        return (tensor,)

    @property
    def shard_dim(self) -> int | None:
        """The dim of the Megatron tensor that is sharded; `axis` is the dim of the Hugging Face tensors."""
        return self.linear.axis

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        """Per part of `join`: a view of the Megatron tensor with the part's values in order, in any shape; None: there are no views."""
        return (tensor,)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        """Relative sizes along `axis` of what `split` returns."""
        return (1,)

    def ranges(self, length: int, heads: Heads) -> tuple[tuple[int, int], ...]:
        """(begin, end) of each part along `axis` of one Hugging Face tensor of this `length`."""
        return ((0, length),)

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        """(begin, end) along `axis` of what a rank has of each part; None where that is an even shard of each."""
        return None

    def fuse(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The Hugging Face tensors that whole parts form."""
        return tuple(parts)

    @property
    def linear(self) -> "Pack":
        """The pack of the same linear with tensors stored [out, in], as in Megatron and PEFT."""
        return self


@dataclass(frozen=True)
class GateUp(Pack):
    """Gate and up projection [ffn, ...], concatenated to [2 * ffn, ...]. A rank has its shard of gate, then its shard of up."""

    axis: int | None = 0

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return torch.cat(tuple(parts))

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tuple(tensor.chunk(2))

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        return self.split(tensor, heads)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return (1, 1)


@dataclass(frozen=True)
class Qkv(Pack):
    """Query, key and value, interleaved by group: [groups, queries_per_group + 2, head_dim, ...], flattened to rows."""

    axis: int | None = 0

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        if heads.rows is not None:
            return torch.cat(tuple(parts))
        rest = parts[0].shape[1:]
        groups = parts[1].shape[0] // heads.head_dim
        blocks = [part.reshape(groups, -1, heads.head_dim, *rest) for part in parts]
        return torch.cat(blocks, dim=1).reshape(-1, *rest)

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        if heads.rows is not None:
            return self._blocks(tensor, heads)
        return tuple(block.reshape(-1, *tensor.shape[1:]) for block in self._blocks(tensor, heads))

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        return self._blocks(tensor, heads)

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        return heads.rows

    def _blocks(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        if heads.rows is not None:
            return tensor.split([stop - start for start, stop in heads.rows])
        groups = tensor.reshape(-1, sum(self.shares(heads)), heads.head_dim, *tensor.shape[1:])
        return groups.split(self.shares(heads), dim=1)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return (heads.queries_per_group, 1, 1)


@dataclass(frozen=True)
class GatedQkv(Qkv):
    """`Qkv` with a gate for every query head.

    In Hugging Face's tensor each head has its query, then its gate; in Megatron's a group has all its queries, then all its gates.
    """

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        query = parts[0].unflatten(0, (-1, heads.queries_per_group, 2, heads.head_dim)).transpose(1, 2).flatten(0, 3)
        return super().join((query, *parts[1:]), heads)

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tuple(place.reshape(-1, *tensor.shape[1:]) for place in self.places(tensor, heads))

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        query, key, value = self._blocks(tensor, heads)
        return query.unflatten(1, (2, -1)).transpose(1, 2), key, value

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return (2 * heads.queries_per_group, 1, 1)


@dataclass(frozen=True)
class ByKeyHead(Pack):
    """Query, key and value channels of a gated delta net, interleaved by key head: [key_heads, sum(channels), ...], flattened."""

    axis: int | None = 0

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        by_head = [part.unflatten(0, (-1, channels)) for part, channels in zip(parts, heads.channels, strict=True)]
        return torch.cat(by_head, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tuple(place.flatten(0, 1) for place in self.places(tensor, heads))

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tensor.unflatten(0, (-1, sum(heads.channels))).split(heads.channels, dim=1)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return heads.channels


@dataclass(frozen=True)
class Fused(Pack):
    """The parts of `inner`, concatenated in a single Hugging Face tensor (phi3's qkv_proj, glm's gate_up_proj)."""

    axis: int | None = 0
    inner: Pack = field(default_factory=Pack)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return self.inner.join(parts, heads)

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return self.inner.split(tensor, heads)

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        return self.inner.places(tensor, heads)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return self.inner.shares(heads)

    def ranges(self, length: int, heads: Heads) -> tuple[tuple[int, int], ...]:
        shares = self.shares(heads)
        ends = [length * end // sum(shares) for end in accumulate(shares)]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        return self.inner.rows(heads)

    def fuse(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(tuple(parts)),)


@dataclass(frozen=True)
class Transposed(Pack):
    """`inner` of a linear whose Hugging Face tensors are transposed, [in, out] (transformers' Conv1D); `axis` is a dim of those."""

    inner: Pack = field(default_factory=Pack)

    @classmethod
    def of(cls, inner: Pack) -> "Transposed":
        """`inner` with transposed tensors."""
        return cls(axis=None if inner.axis is None else 1 - inner.axis, inner=inner)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return self.inner.join([part.t() for part in parts], heads)

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return tuple(part.t() for part in self.inner.split(tensor, heads))

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        found = self.inner.places(tensor, heads)
        return None if found is None else tuple(place.movedim(-1, 0) for place in found)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return self.inner.shares(heads)

    def ranges(self, length: int, heads: Heads) -> tuple[tuple[int, int], ...]:
        return self.inner.ranges(length, heads)

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        return self.inner.rows(heads)

    def fuse(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(whole.t() for whole in self.inner.fuse([part.t() for part in parts]))

    @property
    def linear(self) -> Pack:
        return self.inner


@dataclass(frozen=True)
class PerHead(Pack):
    """One tensor [head_dim] for each query head (`keys`: for each key head). Megatron's is [heads, head_dim], sharded by heads.

    A rank has its own heads' tensors whole and nothing of the others.
    """

    axis: int | None = 0
    keys: bool = False

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return torch.cat(tuple(parts)).unflatten(0, (-1, heads.head_dim))

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        first = self._first(heads)
        after = self._count(heads) - first - len(tensor)
        return (*(tensor[0, :0],) * first, *tensor.unbind(), *(tensor[0, :0],) * after)

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        return self.split(tensor, heads)

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        size = heads.place[1]
        if size == 1:
            return None
        mine = range(self._first(heads), self._first(heads) + self._count(heads) // size)
        return tuple((0, heads.head_dim if head in mine else 0) for head in range(self._count(heads)))

    def shares(self, heads: Heads) -> tuple[int, ...]:
        return (1,) * self._count(heads)

    def _count(self, heads: Heads) -> int:
        return heads.groups * (1 if self.keys else heads.queries_per_group)

    def _first(self, heads: Heads) -> int:
        rank, size = heads.place
        return self._count(heads) // size * rank


@dataclass(frozen=True)
class OneRow(Pack):
    """A vector, whole on every rank, that Hugging Face stores as a matrix [1, n]."""

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        (part,) = parts
        return part[0]

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (tensor[None],)


@dataclass(frozen=True)
class InterleavedGateUp(Pack):
    """Gate and up interleaved by feature in a single Hugging Face tensor: [in, 2 * ffn], transposed, or a bias [2 * ffn]."""

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        (part,) = parts
        rows = part.t()  # a bias has one dim, and t() returns it unchanged
        return torch.cat((rows[::2], rows[1::2]))

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (torch.stack(tensor.chunk(2), dim=1).flatten(0, 1).t(),)

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        by_feature = tensor.unflatten(0, (2, -1)).transpose(0, 1)
        return (by_feature if tensor.dim() == 1 else by_feature.permute(2, 0, 1),)

    @property
    def shard_dim(self) -> int | None:
        return 0


COLUMN = Pack(0)
ROW = Pack(1)
REPLICATED = Pack(None)
ONE_ROW = OneRow(None)
INTERLEAVED_GATE_UP = InterleavedGateUp(1)
INTERLEAVED_GATE_UP_BIAS = InterleavedGateUp(0)
PER_QUERY_HEAD, PER_KEY_HEAD = PerHead(), PerHead(keys=True)
VOCAB = Pack(0, padded=True)
GATE_UP = GateUp()
QKV = Qkv()
FUSED_GATE_UP = Fused(inner=GATE_UP)
FUSED_QKV = Fused(inner=QKV)
GATED_QKV = GatedQkv()
FUSED_BY_KEY_HEAD = Fused(inner=ByKeyHead())
TRANSPOSED_COLUMN, TRANSPOSED_ROW, TRANSPOSED_FUSED_QKV = (Transposed.of(pack) for pack in (COLUMN, ROW, FUSED_QKV))
