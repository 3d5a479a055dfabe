"""Models with learned positions, transposed weights, ALiBi and a norm on the embedding: every layout takes the steps of one rank."""

import dataclasses
from pathlib import Path

import pytest

from swift_mega.device.device import Device
from swift_mega.parallel.layout import parse_layout
from tests.pairs import both_tuners, covering, of_layouts, once
from tests.train.bench import bench, check, check_steps


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classic")


CASES = [(family, layout) for family in ("gpt2", "bloom") for layout in ("tp2-pp2-sp", "pp2-vpp2", "tp2-dp2-sp")]
RECOMPUTED = both_tuners([("gpt2", "tp2-sp"), ("bloom", "tp2-sp")])


@pytest.mark.parametrize("family, layout, tuner", covering(both_tuners(CASES), of_layouts(str)))
def test_layout(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Including clipping by the gradient's norm, which counts sharded and whole parameters."""
    check(work, cpu, family, tuner, layout)


@pytest.mark.parametrize("family, layout, tuner", covering(RECOMPUTED, once))
def test_recompute(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    check(work, cpu, family, tuner, layout, recompute="full")


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_distributed_optimizer(work: Path, cpu: Device, family: str) -> None:
    """Optimizer state sharded over data ranks, communication overlapped: the tables of the embedding are waited for like any parameter."""
    parallel, world = parse_layout("tp2-dp2-sp")
    parallel = dataclasses.replace(
        parallel, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=4000
    )
    one = bench(work, cpu, family, "full")
    check_steps(one, *one.steps("overlap", parallel, world))
