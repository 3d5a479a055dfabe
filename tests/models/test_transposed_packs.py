"""Weights stored [in, out] are in Megatron's [out, in] as computed by hand, whole and sharded."""

import pytest
import torch

from swift_mega.models.packs import TRANSPOSED_COLUMN, TRANSPOSED_FUSED_QKV, TRANSPOSED_ROW, Heads, Pack

# Two inputs; two heads of one feature. A column's number says query, key or value (1, 2, 3), and then which head (1, 2).
FUSED = torch.tensor([[11, 12, 21, 22, 31, 32], [-11, -12, -21, -22, -31, -32]])
SHARDS = {1: [[11, 21, 31, 12, 22, 32]], 2: [[11, 21, 31], [12, 22, 32]]}


@pytest.mark.parametrize("tensor", SHARDS)
def test_fused_query_key_value(tensor):
    """Megatron's rows are query, key and value of one head, then of the next head."""
    heads, pieces = Heads(1, 1), []
    for rank, rows in enumerate(SHARDS[tensor]):
        parts = []
        for start, end in TRANSPOSED_FUSED_QKV.ranges(6, heads):
            share = (end - start) // tensor
            parts.append(FUSED[:, start + rank * share : start + (rank + 1) * share])
        local = TRANSPOSED_FUSED_QKV.join(parts, heads)
        assert local.tolist() == [[row, -row] for row in rows]
        pieces.append(TRANSPOSED_FUSED_QKV.split(local, heads))
    whole = [torch.cat(part, dim=TRANSPOSED_FUSED_QKV.axis or 0) for part in zip(*pieces, strict=True)]
    assert [part.shape for part in whole] == [(2, 2)] * 3
    (back,) = TRANSPOSED_FUSED_QKV.fuse(whole)
    assert torch.equal(back, FUSED)


@pytest.mark.parametrize(
    ("pack", "axis", "shards"),
    [
        (TRANSPOSED_COLUMN, 1, [[[1, 5], [2, 6]], [[3, 7], [4, 8]]]),
        (TRANSPOSED_ROW, 0, [[[1], [2], [3], [4]], [[5], [6], [7], [8]]]),
    ],
)
def test_even_cuts(pack: Pack, axis: int, shards: list[list[list[int]]]) -> None:
    """[in 2, out 4]: a column-parallel linear shards the outputs, which are stored columns; a row-parallel one the inputs, which are
    stored rows."""
    stored, heads = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), Heads(1, 1)
    assert pack.axis == axis
    for part, expected in zip(stored.chunk(2, axis), shards, strict=True):
        local = pack.join([part], heads)
        assert local.tolist() == expected
        assert torch.equal(pack.split(local, heads)[0], part)
