"""Attention and the blocks of ring attention with the kernels of the device: output and gradients against the definition in float64."""

import pytest
import torch

from benchmarks.gpu_check import attention, blocks
from benchmarks.gpu_check.bench import Bench


@pytest.mark.parametrize("dtype", attention.LIMITS, ids=str)
@pytest.mark.parametrize("case", attention.CASES)
def test_attention_is_its_definition(bench: Bench, case: str, dtype: torch.dtype) -> None:
    error = attention.worst_error(bench.device.device, attention.CASES[case], dtype, attention.SMALL_BOUNDS)
    assert error <= attention.LIMITS[dtype]


@pytest.mark.parametrize("dtype", blocks.LIMITS, ids=str)
@pytest.mark.parametrize("ring", blocks.RINGS)
@pytest.mark.parametrize("row", blocks.ROWS)
def test_blocks_of_a_ring_make_the_whole(bench: Bench, row: str, ring: int, dtype: torch.dtype) -> None:
    error = blocks.worst_error(bench.device.device, blocks.ROWS[row], ring, dtype, small=True)
    assert error <= blocks.LIMITS[dtype]
