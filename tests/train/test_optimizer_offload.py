"""AdamW's state and step on the host, by Megatron's own offloading: the weights have the same bits as without it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from swift_mega.config import schema
from swift_mega.device.device import Device
from swift_mega.launch.torchrun import run_ranks
from swift_mega.parallel import groups as parallel_groups
from swift_mega.parallel.layout import Layout, parse_layout
from swift_mega.train.step import train_step
from swift_mega.train.wire import build_training
from swift_mega.verify import parity
from tests.pairs import all_pairs, covering
from tests.train.bench import OPTIM, Bench, bench, settings

STEPS = 3
FALLING = dataclasses.replace(OPTIM, schedule="linear")

CASES = [
    *(
        ("llama", tuner, layout, "float32", False, 1.0)
        for tuner in ("full", "lora")
        for layout in ("dp1", "dp2", "tp2")
    ),
    *(("llama", tuner, layout, "float32", True, 1.0) for tuner in ("full", "lora") for layout in ("dp1", "dp2", "tp2")),
    *(
        ("llama", tuner, layout, "bfloat16", True, 1.0)
        for tuner in ("full", "lora")
        for layout in ("dp1", "dp2", "tp2")
    ),
    ("llama", "full", "dp1", "float32", False, 0.5),
    ("llama", "lora", "dp2", "float32", True, 0.5),
    ("llama", "full", "dp2", "bfloat16", True, 0.5),
    ("llama", "full", "pp2-dp2", "bfloat16", True, 0.3),
    ("mixtral", "full", "ep2-dp2", "float32", True, 1.0),  # experts have an optimizer of their own
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizer_offload")


def steps(run: schema.Run, device: Device, layout: Layout, rows: parity.Rows) -> dict[str, Any]:
    """The first rank's losses, gradient norms and trained weights, and how many numbers each optimizer stepped at which rate."""
    groups = parallel_groups.init(layout, seed=run.train.seed)
    training = build_training(run, device, groups, steps=STEPS)
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    found["buffers"] = {buffer.grad_data.dtype for chunk in training.chunks for buffer in chunk.buffers}
    hybrids = [
        one.optimizer
        for one in training.optimizer.chained_optimizers
        if isinstance(one.optimizer, HybridDeviceOptimizer)
    ]
    for step in range(STEPS):
        rotated = [*rows[2 * step :], *rows[: 2 * step]]
        result = train_step(training, parity.microbatches(rotated, layout, groups.coordinate.data))
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        used = {group["lr"] for hybrid in hybrids for each in hybrid.sub_optimizers for group in each.param_groups}
        found["rates"].append((result.learning_rate, used))
    for chunk in training.chunks:
        if run.parallel.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    found["weights"] = {
        named.name: named.parameter.detach().clone()
        for named in training.tuner.exported(training.part)
        if named.parameter.requires_grad
    }
    found["host"] = sum(numbers(each) for hybrid in hybrids for each in hybrid.cpu_optimizers)
    found["device"] = sum(numbers(hybrid.gpu_optimizer) for hybrid in hybrids if hybrid.gpu_optimizer)
    for hybrid in hybrids:
        for copy, parameter in hybrid.cpu_copys_map_gpu_param.items():
            assert type(copy) is torch.Tensor and copy.dtype == torch.float32
            assert copy.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr(), "no copy"
    parallel_groups.close()
    return found


def numbers(optimizer: torch.optim.Optimizer) -> int:
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


@pytest.mark.parametrize(
    "family, tuner, layout, dtype, cut, fraction", covering(CASES, all_pairs, lambda case: 1 + parse_layout(case[2])[1])
)
def test_steps_are_those_without_it(
    work: Path, cpu: Device, family: str, tuner: str, layout: str, dtype: str, cut: bool, fraction: float
) -> None:
    """Three steps at three learning rates, with clipping. The optimizers on device and host got each rate."""
    parallel, world = parse_layout(layout)
    parallel = dataclasses.replace(parallel, distributed_optimizer=cut)
    compare(bench(work, cpu, family, tuner, layers=2), parallel, world, dtype, fraction)


def test_overlapped_communication(work: Path, cpu: Device) -> None:
    """The parameters gathered during the next forward pass are those that were copied from the host."""
    parallel = schema.Parallel(overlap_grad_reduce=True, overlap_param_gather=True)
    compare(bench(work, cpu, "llama", "full", layers=2), parallel, 2, "bfloat16", 1.0)


@pytest.mark.parametrize("layout", ["dp1", "dp2", pytest.param("tp2", marks=pytest.mark.full)])
def test_gradients_summed_in_bfloat16(work: Path, cpu: Device, layout: str) -> None:
    """Half the bytes, and steps near those of a float32 sum. On the host, bfloat16 gradients are clipped before they become float32."""
    parallel, world = parse_layout(layout)
    one, narrow = bench(work, cpu, "llama", "full", layers=2), dataclasses.replace(parallel, gradients_in_float32=False)
    moved = dataclasses.replace(FALLING, cpu_offload=True)
    wide, *found = (
        run_ranks(
            world,
            steps,
            dataclasses.replace(settings(one.model, each, one.tuner, one.adapter, dtype="bfloat16"), optim=optim),
            one.cpu,
            one.layout(each, world),
            one.rows,
        )
        for each, optim in ((parallel, FALLING), (narrow, FALLING), (narrow, moved))
    )
    assert wide["buffers"] == {torch.float32}
    for each in found:
        assert each["buffers"] == {torch.bfloat16}
        assert each["losses"] == pytest.approx(wide["losses"], rel=1e-3)
        assert each["norms"] == pytest.approx(wide["norms"], rel=1e-2)
        assert each["norms"] != wide["norms"]
    assert found[1]["host"] > 0


def compare(one: Bench, parallel: schema.Parallel, world: int, dtype: str, fraction: float) -> None:
    run = dataclasses.replace(settings(one.model, parallel, one.tuner, one.adapter, dtype=dtype), optim=FALLING)
    offloaded = dataclasses.replace(FALLING, cpu_offload=True, offload_fraction=fraction)
    plain, found = (
        run_ranks(world, steps, dataclasses.replace(run, optim=optim), one.cpu, one.layout(parallel, world), one.rows)
        for optim in (FALLING, offloaded)
    )
    assert plain["host"] == plain["device"] == 0, "the oracle offloads nothing"
    total = found["host"] + found["device"]
    assert total > 0 and found["host"] >= fraction * total and (fraction == 1.0 or found["device"] > 0)
    assert found["losses"] == plain["losses"] and found["norms"] == plain["norms"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, found["weights"][name]), name
    assert len({rate for rate, _ in found["rates"]}) == STEPS, "the rate falls"
    assert all(used == {rate} for rate, used in found["rates"]), found["rates"]
