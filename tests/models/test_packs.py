"""Packs equal layouts written out by hand and, for any sizes, the layouts that a slow loop computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swift_mega.convert.slices import slices
from swift_mega.models.family import Rule
from swift_mega.models.packs import (
    COLUMN,
    FUSED_BY_KEY_HEAD,
    FUSED_QKV,
    GATE_UP,
    GATED_QKV,
    PER_KEY_HEAD,
    PER_QUERY_HEAD,
    QKV,
    REPLICATED,
    ROW,
    VOCAB,
    Heads,
    Pack,
)
from tests import by_hand

NONE = Heads(1, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8)


def cut(part: Tensor, axis: int | None, tensor: int, rank: int) -> Tensor:
    """The slices that a rank reads of one Hugging Face tensor."""
    if axis is None:
        return part
    share = part.shape[axis] // tensor
    return part.narrow(axis, rank * share, share)


def shard(pack: Pack, parts: list[Tensor], heads: Heads, tensor: int, rank: int) -> Tensor:
    return pack.join([cut(part, pack.axis, tensor, rank) for part in parts], heads)


# --- written out by hand: 4 query heads in 2 groups of 2, head_dim 2, hidden 1; query row q is 10 + q, key row 30 + k, value row 50 + v

QUERY, KEY, VALUE = [10, 11, 12, 13, 14, 15, 16, 17], [30, 31, 32, 33], [50, 51, 52, 53]
FUSED = [10, 11, 12, 13, 30, 31, 50, 51, 14, 15, 16, 17, 32, 33, 52, 53]
GATE, UP = [1, 2, 3, 4], [-1, -2, -3, -4]

# pack, Hugging Face tensors, tensor size -> the shard of each rank
BY_HAND = [
    (QKV, [QUERY, KEY, VALUE], 1, [FUSED]),
    (QKV, [QUERY, KEY, VALUE], 2, [[10, 11, 12, 13, 30, 31, 50, 51], [14, 15, 16, 17, 32, 33, 52, 53]]),
    (GATE_UP, [GATE, UP], 1, [[1, 2, 3, 4, -1, -2, -3, -4]]),
    (GATE_UP, [GATE, UP], 2, [[1, 2, -1, -2], [3, 4, -3, -4]]),
    (GATE_UP, [GATE, UP], 4, [[1, -1], [2, -2], [3, -3], [4, -4]]),
    (COLUMN, [GATE], 2, [[1, 2], [3, 4]]),
    (COLUMN, [GATE], 4, [[1], [2], [3], [4]]),
    (REPLICATED, [GATE], 2, [GATE, GATE]),
    (VOCAB, [GATE], 2, [[1, 2], [3, 4]]),
]


@pytest.mark.parametrize(("pack", "parts", "tensor", "shards"), BY_HAND)
@pytest.mark.parametrize("columns", [0, 1, 3], ids=["bias", "weight1", "weight3"])
def test_rows_are_where_the_hand_written_layout_has_them(pack, parts, tensor, shards, columns):
    """columns 0: a bias [out]; else a weight [out, columns] in which every number of a row is the row's number."""

    def made(rows: list[int]) -> Tensor:
        flat = torch.tensor(rows)
        return flat if columns == 0 else flat[:, None] * 100 + torch.arange(columns)

    for rank, rows in enumerate(shards):
        found = shard(pack, [made(part) for part in parts], Heads(2, 2), tensor, rank)
        assert torch.equal(found, made(rows)), f"rank {rank}"


def test_a_row_cut_takes_columns():
    weight = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shard(ROW, [weight], NONE, 2, 0).tolist() == [[1, 2], [5, 6]]
    assert shard(ROW, [weight], NONE, 2, 1).tolist() == [[3, 4], [7, 8]]
    assert shard(ROW, [weight], NONE, 4, 2).tolist() == [[3], [7]]


def test_qkv_with_one_query_per_group_and_with_one_group():
    """Multi-head attention (queries = groups) and multi-query attention are the two extremes of the same rule."""
    q, k, v = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    assert QKV.join([q, k, v], Heads(1, 1)).tolist() == [1, 4, 7, 2, 5, 8, 3, 6, 9]
    assert QKV.join([q, k[:1], v[:1]], Heads(3, 1)).tolist() == [1, 2, 3, 4, 7]


def test_split_undoes_join_by_hand():
    query, key, value = QKV.split(torch.tensor(FUSED), Heads(2, 2))
    assert (query.tolist(), key.tolist(), value.tolist()) == (QUERY, KEY, VALUE)
    gate, up = GATE_UP.split(torch.tensor([1, 2, -1, -2]), NONE)
    assert (gate.tolist(), up.tolist()) == ([1, 2], [-1, -2])


# --- any sizes


def numbered(length: int, columns: int, first: int, dtype: torch.dtype) -> Tensor:
    """[length(, columns)] of values that differ between rows as far as the dtype allows."""
    count = length * max(columns, 1)
    flat = (torch.arange(count) * 7 + first) % 120
    return flat.to(dtype).reshape((length, columns) if columns else (length,))


def agrees(pack: Pack, parts: list[Tensor], heads: Heads, tensor: int, rows: list[list[by_hand.Source]]) -> None:
    """Every rank's shard equals the slow loop's, and all shards give the parts back, with bits and dtype."""
    dim = pack.axis or 0
    pieces = []
    for rank in range(tensor):
        found = shard(pack, parts, heads, tensor, rank)
        expected = by_hand.gather(parts, rows[rank], dim)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        pieces.append(pack.split(found, heads))
    for number, part in enumerate(parts):
        back = torch.cat([piece[number] for piece in pieces], dim=dim)
        assert back.dtype == part.dtype and torch.equal(back, part)


SIZES = st.integers(1, 4)
COLUMNS = st.integers(0, 3)
TENSORS = st.sampled_from([1, 2, 3, 4])
KINDS = st.sampled_from(DTYPES)


@settings(max_examples=150, deadline=None)
@given(
    tensor=TENSORS, multiple=SIZES, queries=st.integers(1, 5), head_dim=st.integers(1, 5), columns=COLUMNS, dtype=KINDS
)
def test_qkv_equals_the_slow_loop(tensor, multiple, queries, head_dim, columns, dtype):
    groups = tensor * multiple
    lengths = (groups * queries * head_dim, groups * head_dim, groups * head_dim)
    parts = [numbered(length, columns, 40 * n, dtype) for n, length in enumerate(lengths)]
    rows = [
        by_hand.qkv_rows(groups=groups, queries=queries, head_dim=head_dim, tensor=tensor, rank=rank)
        for rank in range(tensor)
    ]
    agrees(QKV, parts, Heads(queries, head_dim), tensor, rows)


@settings(max_examples=150, deadline=None)
@given(
    tensor=TENSORS, multiple=SIZES, queries=st.integers(1, 5), head_dim=st.integers(1, 5), columns=COLUMNS, dtype=KINDS
)
def test_gated_qkv_equals_the_slow_loop(tensor, multiple, queries, head_dim, columns, dtype):
    groups = tensor * multiple
    lengths = (2 * groups * queries * head_dim, groups * head_dim, groups * head_dim)
    parts = [numbered(length, columns, 40 * n, dtype) for n, length in enumerate(lengths)]
    rows = [
        by_hand.gated_qkv_rows(groups=groups, queries=queries, head_dim=head_dim, tensor=tensor, rank=rank)
        for rank in range(tensor)
    ]
    agrees(GATED_QKV, parts, Heads(queries, head_dim), tensor, rows)


@settings(max_examples=80, deadline=None)
@given(tensor=TENSORS, multiple=SIZES, widths=st.tuples(SIZES, SIZES, SIZES), columns=COLUMNS, dtype=KINDS)
def test_channels_of_key_heads_equal_the_slow_loop(tensor, multiple, widths, columns, dtype):
    """One Hugging Face tensor has query, key and value channels of all heads. A rank has those of its own heads, head by head."""
    count, heads = tensor * multiple, Heads(1, 1, channels=widths)
    whole = numbered(count * sum(widths), columns, 0, dtype)
    runs = FUSED_BY_KEY_HEAD.ranges(len(whole), heads)
    assert runs == tuple((count * start, count * end) for start, end in by_hand.runs(widths))
    parts = [whole[start:end] for start, end in runs]
    rows = [by_hand.key_head_rows(heads=count, widths=widths, tensor=tensor, rank=rank) for rank in range(tensor)]
    agrees(FUSED_BY_KEY_HEAD, parts, heads, tensor, rows)
    assert torch.equal(FUSED_BY_KEY_HEAD.fuse(parts)[0], whole)


@pytest.mark.parametrize(
    ("pack", "rows", "heads"),
    [(QKV, 24, Heads(2, 3)), (GATED_QKV, 36, Heads(2, 3)), (FUSED_BY_KEY_HEAD, 18, Heads(1, 1, channels=(2, 3, 4)))],
)
def test_places_are_views_of_what_split_gives(pack, rows, heads):
    """Numbers written into the views are in the tensor, where `split` returns them in order."""
    tensor = torch.zeros(rows, 2, dtype=torch.int64)
    for number, place in enumerate(pack.places(tensor, heads)):
        assert place.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        place.copy_(100 * number + torch.arange(place.numel()).reshape(place.shape))
    for number, part in enumerate(pack.split(tensor, heads)):
        assert part.flatten().tolist() == [100 * number + n for n in range(part.numel())]


@settings(max_examples=150, deadline=None)
@given(
    groups=SIZES, ranks=st.integers(2, 5), each=st.integers(1, 3), features=SIZES, columns=COLUMNS, fused=st.booleans()
)
def test_more_ranks_than_key_heads_equal_the_slow_loop(groups, ranks, each, features, columns, fused):
    """`ranks` of them per group, `each` query heads on one: the joined slices equal the row-by-row list, and split is the inverse."""
    tensor, head_dim = groups * ranks, features * ranks
    lengths = (tensor * each * head_dim, groups * head_dim, groups * head_dim)
    parts = [numbered(length, columns, 40 * n, torch.int64) for n, length in enumerate(lengths)]
    names, stored = (("qkv",), (torch.cat(parts),)) if fused else (("q", "k", "v"), parts)
    hf, heads = dict(zip(names, stored, strict=True)), Heads(ranks * each, head_dim, groups)
    rule = Rule("linear_qkv.weight", names, FUSED_QKV if fused else QKV)
    for rank in range(tensor):
        wanted = by_hand.qkv_rows(groups=groups, queries=ranks * each, head_dim=head_dim, tensor=tensor, rank=rank)
        shapes = {name: tuple(value.shape) for name, value in hf.items()}
        pieces = slices(rule, shapes, rank_size=(rank, tensor), heads=heads, rows=len(wanted))
        read = [hf[piece.name][piece.start : piece.stop] for piece in pieces]
        mine, expected = heads.on(rank, tensor), by_hand.gather(parts, wanted)
        found = rule.pack.join(read, mine)
        assert torch.equal(found, expected)
        for back in (rule.pack.split(found, mine), rule.pack.places(found, mine)):
            assert len(back) == 3 and all(map(torch.equal, back, read))


@settings(max_examples=80, deadline=None)
@given(tensor=TENSORS, multiple=SIZES, columns=COLUMNS, dtype=KINDS)
def test_gate_up_equals_the_slow_loop(tensor, multiple, columns, dtype):
    ffn = tensor * multiple
    parts = [numbered(ffn, columns, 60 * n, dtype) for n in range(2)]
    agrees(
        GATE_UP,
        parts,
        NONE,
        tensor,
        [by_hand.gate_up_rows(ffn=ffn, tensor=tensor, rank=rank) for rank in range(tensor)],
    )


@settings(max_examples=80, deadline=None)
@given(tensor=TENSORS, multiple=SIZES, other=st.integers(1, 3), dtype=KINDS, axis=st.sampled_from([0, 1]))
def test_even_cuts_equal_the_slow_loop(tensor, multiple, other, dtype, axis):
    length = tensor * multiple
    part = numbered(length, other, 0, dtype) if axis == 0 else numbered(other, length, 0, dtype)
    rows = [by_hand.even_rows(length=length, tensor=tensor, rank=rank) for rank in range(tensor)]
    agrees(COLUMN if axis == 0 else ROW, [part], NONE, tensor, rows)


@settings(max_examples=60, deadline=None)
@given(tensor=TENSORS, multiple=SIZES, queries=st.integers(1, 4), head_dim=st.integers(1, 3), inner=st.integers(1, 3))
def test_an_adapter_on_a_fused_linear_is_the_fused_adapters(tensor, multiple, queries, head_dim, inner):
    """join commutes with a product from the right: the fused weight of B A is the fused B, times A. So one Pack serves weights and
    adapters."""
    groups, heads = tensor * multiple, Heads(queries, head_dim)
    ups = [torch.randn(n * groups * head_dim, inner, dtype=torch.float64) for n in (queries, 1, 1)]
    down = torch.randn(inner, 3, dtype=torch.float64)
    for rank in range(tensor):
        whole = shard(QKV, [up @ down for up in ups], heads, tensor, rank)
        torch.testing.assert_close(shard(QKV, ups, heads, tensor, rank) @ down, whole, rtol=0, atol=1e-12)


def test_norms_of_each_head_lie_by_head():
    """Written out for 4 query heads over 2 key heads on 2 ranks: each rank has the whole tensors of its own heads and no other."""
    heads = Heads(2, 3, 2)
    parts = [torch.arange(3.0) + 10 * head for head in range(4)]
    whole = PER_QUERY_HEAD.join(parts, heads)
    assert whole.tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert all(torch.equal(found, part) for found, part in zip(PER_QUERY_HEAD.split(whole, heads), parts, strict=True))
    second = heads.on(1, 2)
    assert PER_QUERY_HEAD.rows(second) == ((0, 0), (0, 0), (0, 3), (0, 3)) and PER_KEY_HEAD.rows(second) == (
        (0, 0),
        (0, 3),
    )
    mine = PER_QUERY_HEAD.join(
        [part[slice(*rows)] for part, rows in zip(parts, PER_QUERY_HEAD.rows(second), strict=True)], second
    )
    assert mine.tolist() == [[20, 21, 22], [30, 31, 32]]
    assert [len(part) for part in PER_QUERY_HEAD.split(mine, second)] == [0, 0, 3, 3]
    assert PER_QUERY_HEAD.rows(heads) is None
