"""Layer inputs on the host: every bit of the result is the same, only layer inputs are copied, and nothing of them is left after a step."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout
from swift_mega.train import offload
from swift_mega.train.step import evaluate, run_schedule
from swift_mega.train.wire import build_training
from swift_mega.verify import parity
from tests.pairs import both_tuners, covering, kind, of_layouts
from tests.train.bench import bench, settings

LAYOUTS = ["dp1", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2-ring", "tp2-pp2-sp"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


class Counted(offload.HostCopies):
    """Records the tensors that were copied to the host."""

    made: ClassVar["list[Counted]"] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.bytes: list[int] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.made.append(self)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        host, copied = super().to_host(tensor)
        self.bytes.append(tensor.numel() * tensor.element_size())
        self.alive += [weakref.ref(tensor), weakref.ref(host)]
        return host, copied

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        target, copied = super().to_device(host)
        self.alive.append(weakref.ref(target))
        return target, copied


def one_step(run: schema.Run, device: Device, layout: Layout, rows: parity.Rows) -> list[dict[str, Any]]:
    """The results and copies of every rank: loss, gradients, bytes of each tensor copied to the host, and how many of them still exist."""
    offload.HostCopies = Counted  # type: ignore[misc]  # of this rank's process alone
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, device, groups, steps=1)
    batches = parity.microbatches(rows, layout, groups.coordinate.data)
    evaluated = evaluate(training, [batches]).loss
    moved_by_evaluation = sum(len(copies.bytes) for copies in Counted.made)
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    loss = run_schedule(training, batches, forward_only=False).loss
    gc.collect()
    trained = [named for named in training.tuner.exported(training.part) if named.parameter.requires_grad]
    found = {
        "loss": (loss, evaluated),
        "gradients": {named.name: named.parameter.main_grad.clone() for named in trained},
        "bytes": [size for copies in Counted.made for size in copies.bytes],
        "alive": sum(each() is not None for copies in Counted.made for each in copies.alive),
        "leaving": sum(copies.leaving is not None for copies in Counted.made),
        "moved_by_evaluation": moved_by_evaluation,
        "expected": expected(
            layout, groups.coordinate.pipeline, [len(batch.tokens) for batch in batches], training.part
        ),
    }
    everyone: list[dict[str, Any]] = [{} for _ in range(layout.world)]
    dist.all_gather_object(everyone, found)
    parallel_groups.close()
    return everyone


def expected(layout: Layout, stage: int, tokens: list[int], part: Any) -> list[int]:
    """Bytes of every layer's input, except the first input of a later stage, which the schedule keeps."""
    inputs = sum(
        len(layout.layers_of(stage, virtual)) - (0 if stage == virtual == 0 else 1) for virtual in range(layout.virtual)
    )
    saved_by_rank = part.config.distribute_saved_activations
    cut = layout.context * (layout.tensor if layout.sequence or saved_by_rank else 1)
    return sorted(each * part.settings.shape.hidden * 4 // cut for each in tokens for _ in range(inputs))


def check(
    work: Path, cpu: Device, tuner: str, layout: str, family: str = "llama", megatron: dict[str, Any] | None = None
) -> None:
    one = bench(work, cpu, family, tuner, layers=4 if "vpp" in layout else 2)
    parallel, world = parse_layout(layout)
    run = settings(one.model, parallel, tuner, one.adapter, recompute="full")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, megatron=megatron or {}))
    moved = dataclasses.replace(run, train=dataclasses.replace(run.train, offload_activations=True))
    plain, found = (
        run_ranks(world, one_step, each, cpu, one.layout(parallel, world), one.rows) for each in (run, moved)
    )
    for rank in range(world):
        want, have = plain[rank], found[rank]
        assert not want["bytes"], "the oracle offloads nothing"
        assert have["loss"] == want["loss"]
        assert have["gradients"].keys() == want["gradients"].keys() and have["gradients"]
        for name, gradient in want["gradients"].items():
            assert torch.equal(have["gradients"][name], gradient), f"rank {rank}: {name}"
        assert sorted(have["bytes"]) == have["expected"]
        assert have["alive"] == have["leaving"] == have["moved_by_evaluation"] == 0
    assert any(each["bytes"] for each in found)


@pytest.mark.parametrize(
    "family, layout, tuner", covering(both_tuners(("llama", name) for name in LAYOUTS), of_layouts(kind))
)
def test_layouts(work: Path, cpu: Device, family: str, layout: str, tuner: str) -> None:
    """Loss and gradients have the same bits; the layers' inputs are copied; an evaluation copies nothing."""
    check(work, cpu, tuner, layout, family)


@pytest.mark.parametrize("family, layout", [("mixtral", "ep2-dp2"), ("deepseek_v3_moe", "pp2"), ("bloom", "dp2")])
def test_families(work: Path, cpu: Device, family: str, layout: str) -> None:
    """Experts, latent attention, and an embedding with a norm, whose output is the first layer's input."""
    check(work, cpu, "full", layout, family)


def test_inputs_that_tensor_ranks_share(work: Path, cpu: Device) -> None:
    """Megatron's distribute_saved_activations: each rank saves its part, and the parts are gathered after the copy back."""
    check(work, cpu, "full", "tp2", megatron={"distribute_saved_activations": True})
