"""Fixtures for the tests of attention kernels."""

from collections.abc import Iterator

import pytest
import torch

from swift_mega.ops.kernels import resolve
from tests.ops.kernel_stand_ins import OPERATORS


@pytest.fixture
def torch_operators() -> Iterator[None]:
    """torch's attention operators of CUDA for tensors on the CPU: stand-ins, which torch calls through the operators' own schemas."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in OPERATORS.items():
        library.impl(name, function, "CPU")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def no_answers_of_another_test() -> Iterator[None]:
    """The registry of kernels keeps its answers, and tests change what they depend on."""
    resolve.cache_clear()
    yield
    resolve.cache_clear()
