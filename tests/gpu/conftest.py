"""Where the tests of this folder run: on the CPU in `make test`, on a GPU with `pytest -m gpu`. They share their bodies with `make
gpu-check`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from swift_mega.device import device as devices

if TYPE_CHECKING:  # it imports Megatron, which must come after tests/conftest.py
    from benchmarks.gpu_check.bench import Bench

OneRank = Callable[..., Any]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Bench":
    """Tiny models on the kind of device that the parameter names."""
    device = devices.setup()
    if device.kind != request.param:
        pytest.skip(f"this process computes on {device.name}; for CUDA run `pytest -m gpu` on a machine with a GPU")
    from benchmarks.gpu_check.bench import Bench

    return Bench(device, True, tmp_path_factory.mktemp("bench"))


@pytest.fixture
def one_rank(bench: "Bench") -> OneRank:
    """one_rank(body, *args): runs body where torch.distributed has one rank: in a fork on the CPU, in this process on CUDA."""

    def run(body: Callable[..., Any], *args: Any) -> Any:
        from swift_mega.launch.torchrun import run_ranks

        return run_ranks(1, body, *args, device_kind=bench.device.kind, start="here" if bench.on_gpu else "fork")

    return run
