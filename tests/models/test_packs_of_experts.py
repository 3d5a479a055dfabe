"""How stacked and transposed experts are arranged in Megatron's linears, written out by hand."""

import pytest
import torch
from torch import Tensor

from swift_mega.models.packs import (
    INTERLEAVED_GATE_UP,
    INTERLEAVED_GATE_UP_BIAS,
    ONE_ROW,
    TRANSPOSED_ROW,
    Heads,
    Pack,
)

NONE = Heads(1, 1)
# [hidden 2, 2 * ffn 4]: column 2f is gate of feature f, column 2f + 1 is up. In a number, tens are the feature, ones are gate (1) or up
# (2), and the second input adds 100.
GATE_UP = [[1, 2, 11, 12, 21, 22, 31, 32], [101, 102, 111, 112, 121, 122, 131, 132]]
# [ffn 4, hidden 2]
DOWN = [[1, 2], [11, 12], [21, 22], [31, 32]]

CASES = [
    (INTERLEAVED_GATE_UP, GATE_UP, 1, [[[1, 101], [11, 111], [21, 121], [31, 131], [2, 102], [12, 112], [22, 122], [32, 132]]]),
    (INTERLEAVED_GATE_UP, GATE_UP, 2, [[[1, 101], [11, 111], [2, 102], [12, 112]], [[21, 121], [31, 131], [22, 122], [32, 132]]]),
    (INTERLEAVED_GATE_UP_BIAS, GATE_UP[0], 1, [[1, 11, 21, 31, 2, 12, 22, 32]]),
    (INTERLEAVED_GATE_UP_BIAS, GATE_UP[0], 2, [[1, 11, 2, 12], [21, 31, 22, 32]]),
    (TRANSPOSED_ROW, DOWN, 1, [[[1, 11, 21, 31], [2, 12, 22, 32]]]),
    (TRANSPOSED_ROW, DOWN, 2, [[[1, 11], [2, 12]], [[21, 31], [22, 32]]]),
    (ONE_ROW, [[5, 6, 7]], 1, [[5, 6, 7]]),
]  # fmt: skip


@pytest.mark.parametrize(("pack", "whole", "size", "shards"), CASES)
def test_where_numbers_lie(pack: Pack, whole: list[list[int]], size: int, shards: list[list[list[int]]]) -> None:
    """Each rank's part of the Hugging Face tensor fills its part of Megatron's, and the inverse returns it."""
    tensor = torch.tensor(whole)
    parts: list[Tensor] = [tensor] if pack.axis is None else list(tensor.chunk(size, pack.axis))
    for part, shard in zip(parts, shards, strict=True):
        (start, end), *more = pack.ranges(part.shape[pack.axis or 0], NONE)
        # One run of numbers, which ranks share evenly.
        assert not more and (start, end) == (0, part.shape[pack.axis or 0])
        assert pack.join([part], NONE).tolist() == shard
        (back,) = pack.split(torch.tensor(shard), NONE)
        assert torch.equal(back, part)


def test_which_dim_of_megatrons_tensor_is_cut() -> None:
    packs = (INTERLEAVED_GATE_UP, INTERLEAVED_GATE_UP_BIAS, TRANSPOSED_ROW, ONE_ROW)
    assert [pack.shard_dim for pack in packs] == [0, 0, 1, None]
