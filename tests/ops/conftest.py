"""Fixtures for the tests of attention kernels."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.kernel_stand_ins import OPERATORS


@pytest.fixture
def torch_operators() -> Iterator[None]:
    """torch's attention operators of CUDA for tensors on the CPU: stand-ins, which torch calls through the operators' own schemas."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in OPERATORS.items():
        library.impl(name, function, "CPU")
    yield
    library._destroy()
