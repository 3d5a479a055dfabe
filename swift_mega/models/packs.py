"""How the Hugging Face tensors of one Megatron parameter are laid out in it.

A Pack sees tensors and never a rank. Tensor parallelism cuts every part along the same dim (`axis`), and `join` of parts that
are all cut at the same fraction *is* the shard of that fraction. So `join(cut parts)` makes a rank's parameter,
`split(parameter)` gives back its pieces, and neither knows how many ranks there are. The same Pack serves weight and bias,
and the `up` factor of an adapter on that linear.

The one exception: where there are more tensor ranks than key heads, Megatron cuts the rows of a joined QKV within a group, and a rank
has some rows of query, key or value, or none of one. `Heads.on` is told which rank it is, and `Pack.rows` says which rows those are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """What a fused attention projection needs to know: query heads that share one key head, and features per head."""

    queries_per_group: int
    head_dim: int
    groups: int = 0
    """Key heads of the whole model, each with its query heads; 0 where ranks have whole ones in any case."""
    share: tuple[int, int] = (0, 1)
    """(rank, size): whose part of the tensors this is about, where ranks have parts of a group; else (0, 1)."""
    place: tuple[int, int] = (0, 1)
    """(rank, size) of the tensor rank whose tensors this is about."""
    channels: tuple[int, ...] = ()
    """Query, key and value channels of one key head of a gated delta net."""

    def on(self, rank: int, size: int) -> "Heads":
        """The same of what tensor rank `rank` of `size` holds."""
        return replace(self, place=(rank, size), share=self.share if self.groups % size == 0 else (rank, size))

    @property
    def rows(self) -> tuple[tuple[int, int], ...] | None:
        """Where the rows of query, key and value that this share has begin and end; None where it has whole groups.

        They lie one after another in the joined tensor [groups, queries_per_group + 2, head_dim], which is cut evenly; the size is a
        multiple of the groups, so all are of one group (megatron/core/transformer/attention.py, get_query_key_value_tensors).
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
    """One Hugging Face tensor, as it is; cut along `axis`, or whole on every rank (None).

    `expert` marks a parameter cut by the expert-tensor axis in place of the tensor axis. `padded`: the cut dim is padded
    with zero rows until the tensor size divides it (vocabularies).
    """

    axis: int | None = None
    padded: bool = False

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """The Megatron tensor of `parts`, each whole or cut at the same fraction of `axis`."""
        (part,) = parts
        return part

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        """Inverse of `join`; views where possible."""
        return (tensor,)

    @property
    def held_dim(self) -> int | None:
        """The dim of the Megatron tensor that is cut; `axis` is the Hugging Face tensors'."""
        return self.linear.axis

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        """Views of a Megatron tensor that hold the numbers of each part of `join` in order, whatever their shapes; None: there are none."""
        return (tensor,)

    def shares(self, heads: Heads) -> tuple[int, ...]:
        """Relative sizes along `axis` of what `split` gives."""
        return (1,)

    def ranges(self, length: int, heads: Heads) -> tuple[tuple[int, int], ...]:
        """The parts that lie in one Hugging Face tensor of `length` along `axis`: where each begins and ends."""
        return ((0, length),)

    def rows(self, heads: Heads) -> tuple[tuple[int, int], ...] | None:
        """Where what a rank holds of each part begins and ends along `axis`; None where that is its even share of each."""
        return None

    def fuse(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of whole parts."""
        return tuple(parts)

    @property
    def linear(self) -> "Pack":
        """The same of a linear whose tensors are stored [out, in], as Megatron and PEFT have them."""
        return self


@dataclass(frozen=True)
class GateUp(Pack):
    """Gate and up projection [ffn, ...] one above the other: [2 * ffn, ...]. A rank holds its rows of gate, then of up."""

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
    """Query, key, value, interleaved by group: [groups, queries_per_group + 2, head_dim, ...], flattened to rows."""

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
    """`Qkv` with a gate for every query: in turn for each head in Hugging Face's tensor, after all queries of a group in Megatron's."""

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
    """Query, key and value channels of a gated delta net, in turn for each key head."""

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
    """The parts of `inner` one after another in a single Hugging Face tensor (phi3's qkv_proj, glm's gate_up_proj)."""

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
class Turned(Pack):
    """`inner` of a linear whose Hugging Face tensors are stored [in, out] (transformers' Conv1D); `axis` is theirs."""

    inner: Pack = field(default_factory=Pack)

    @classmethod
    def of(cls, inner: Pack) -> "Turned":
        """`inner`, turned."""
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
    """A vector [head_dim] of each query head (or key head, `keys`) in a tensor of its own; Megatron's is [heads, head_dim], cut by heads.

    A rank has all of its heads' tensors and nothing of the others.
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
    """A vector, whole on every rank, that Hugging Face stores as a matrix of one row."""

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        (part,) = parts
        return part[0]

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (tensor[None],)


@dataclass(frozen=True)
class InterleavedGateUp(Pack):
    """Gate and up of one feature after another in a single Hugging Face tensor: [in, 2 * ffn] transposed, or a bias [2 * ffn]."""

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        (part,) = parts
        rows = part.t()  # a bias stays as it is
        return torch.cat((rows[::2], rows[1::2]))

    def split(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        return (torch.stack(tensor.chunk(2), dim=1).flatten(0, 1).t(),)

    def places(self, tensor: Tensor, heads: Heads) -> tuple[Tensor, ...] | None:
        by_feature = tensor.unflatten(0, (2, -1)).transpose(0, 1)
        return (by_feature if tensor.dim() == 1 else by_feature.permute(2, 0, 1),)

    @property
    def held_dim(self) -> int | None:
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
TURNED_COLUMN, TURNED_ROW, TURNED_FUSED_QKV = (Turned.of(pack) for pack in (COLUMN, ROW, FUSED_QKV))
