"""flex_attention for soft-capped scores: its two functions and its table of blocks, by number on the CPU. Its gradient needs a GPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from swift_mega.ops.flex import BLOCK, block_mask, capped_attention
from tests.ops.test_attention import _dense as dense

BOUNDS = [(0, 1), (0, 100), (0, 128, 300), (0, 5, 6, 390, 512, 700)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 60, 200])
def test_blocks_cover_what_is_seen_and_whole_ones_need_no_mask(bounds, window):
    mask = block_mask(bounds, window, torch.device("cpu"))
    tokens = bounds[-1]
    place = torch.arange(tokens)
    example = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    distance = place[:, None] - place[None]
    seen = (example[:, None] == example[None]) & (distance >= 0) & (distance < (window or tokens))
    nothing = torch.tensor(0)
    assert mask.mask_mod(nothing, nothing, place[:, None], place[None]).equal(seen)
    count = -(-tokens // BLOCK)
    partial, whole = (torch.zeros(count, count, dtype=torch.bool) for _ in range(2))
    for table, numbers, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(count):
            table[row, indices[0, 0, row, : numbers[0, 0, row]]] = True
    assert not bool((partial & whole).any())
    for row in range(count):
        for column in range(count):
            pairs = seen[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            assert bool(pairs.any()) == bool(partial[row, column] | whole[row, column])
            assert bool(pairs.all()) or not bool(whole[row, column])


@pytest.mark.parametrize("window", [None, 60])
def test_value_equals_dense_float64(window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(300, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    given = {"bounds": (0, 128, 300), "scale": 0.4, "window": window, "softcap": 1.5}
    found = capped_attention(query, key, value, run=flex_attention, **given)
    torch.testing.assert_close(found, dense(query, key, value, *given.values()), rtol=0, atol=1e-12)
