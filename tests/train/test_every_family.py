"""Every family equals Hugging Face on one rank, full and LoRA, and when it is cut over tensor, expert and pipeline ranks."""

import dataclasses
from pathlib import Path

import pytest

import tiny
from swift_mega.config import schema
from swift_mega.device import Device
from swift_mega.parallel.layout import parse_layout
from tests.train.bench import bench


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_rank(work: Path, cpu: Device, family: str, tuner: str) -> None:
    """One rank equals Hugging Face for every family."""
    found = bench(work, cpu, family, tuner).difference("single", schema.Parallel(distributed_optimizer=False), 1)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found
    assert found.tensors > 20


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_cut(work: Path, cpu: Device, family: str, layout: str) -> None:
    """Tensor, sequence and pipeline parallelism of every family; experts are cut with the ranks there are."""
    one = bench(work, cpu, family, "full")
    name = layout
    if one.shape.experts:
        name = {"tp2-sp": "tp2-ep2-etp1-sp", "pp2": "pp2-ep2"}[layout]
    parallel, world = parse_layout(name)
    found = one.difference(layout, dataclasses.replace(parallel, distributed_optimizer=False), world)
    assert found.logits < 1e-4 and found.loss < 2e-6 and found.gradient < 1e-5, found
