"""The device layer: the facade is complete, can be installed twice, is installed early enough, and fails with an error on another
Megatron."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from swift_mega.device import device
from swift_mega.device.cpu_facade import PATCHES
from swift_mega.device.device import Device
from swift_mega.device.patch import Patch
from swift_mega.device.without_te import WITHOUT_TE

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the facade is for machines without CUDA")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter, because the facade is installed once per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@no_cuda
def test_setup_is_idempotent(cpu):
    """A second call changes nothing: no function is wrapped twice."""
    before = {target: _current(target) for patch in (*PATCHES, *WITHOUT_TE) for target in patch.targets}
    assert device.setup() == cpu == Device(kind="cpu", device=torch.device("cpu"), backend="gloo", name="CPU")
    assert all(_current(target) is was for target, was in before.items())


def _current(target: str) -> object:
    owner, name = Patch(name="look", reason="", targets={})._find(target)
    return getattr(owner, name)


@no_cuda
def test_setup_refuses_a_megatron_that_was_imported_before(cpu):
    ran = run_python("import megatron.core\nfrom swift_mega.device import device\ndevice.setup()")
    assert "UserError: megatron.core was imported before swift_mega.device.device.setup()" in ran.stderr


@no_cuda
def test_setup_and_imports_print_nothing(cpu):
    """Megatron's messages about optional packages are silenced, and compilation is off before Megatron is imported."""
    ran = run_python(
        "from swift_mega.device import device\n"
        "device.setup()\n"
        "import megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer, torch, warnings\n"
        "assert torch.compile(print) is print\n"
        "warnings.warn('others are heard')\n"
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert "others are heard" in lines[0] and len(lines) <= 2, ran.stderr


def test_only_ranks_touch_their_gpu(monkeypatch):
    """The process that starts ranks uses no GPU. A rank makes the GPU of its local rank current, unless a caller chose another one."""
    calls = []
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert device.setup(starts_ranks=True).kind == "cuda" and calls == []
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.setup(starts_ranks=True) == Device(
        kind="cuda", device=torch.device("cuda", 3), backend="nccl", name="GPU number 3"
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert device.setup().device.index == 2 and calls == [3, 2]


def test_the_allocator_grows_its_segments_unless_it_is_configured():
    environ = {}
    device._set_allocator(environ)
    assert list(environ.values()) == ["expandable_segments:True"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environ = {name: "max_split_size_mb:64"}
        device._set_allocator(environ)
        assert environ == {name: "max_split_size_mb:64"}


def test_a_patch_whose_target_is_gone_says_which():
    """An upgrade of Megatron that renames a function stops with the name of the patch, before anything is replaced."""
    was = torch.cuda.synchronize
    patch = Patch(
        name="sample",
        reason="shown in the error",
        targets={"torch.cuda:synchronize": lambda _: None, "torch.cuda:gone|also_gone": lambda _: None},
    )
    with pytest.raises(
        RuntimeError,
        match=r"patch 'sample' \(swift_mega/device\) replaces torch.cuda:gone\|also_gone, .*: shown in the error",
    ):
        patch.install()
    assert torch.cuda.synchronize is was


def test_every_patch_has_its_own_name_and_a_place_in_megatron():
    patches = (*PATCHES, *WITHOUT_TE)
    assert len({patch.name for patch in patches}) == len(patches)
    assert all(".py:" in patch.reason for patch in patches)


@no_cuda
def test_tensors_for_cuda_are_made_on_the_cpu(cpu):
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(1, device=torch.cuda.current_device(), pin_memory=True),
        torch.ones(1, device=None),
        torch.zeros(1).cuda(non_blocking=True),
    ]
    assert all(each.device.type == "cpu" for each in made)
    assert torch.zeros(1, device="meta").device.type == "meta"


@no_cuda
def test_types_are_named_as_on_cuda(cpu):
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).long().type() == "torch.LongTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


@no_cuda
def test_random_state_is_the_cpus(cpu):
    """Megatron's forked random state gives one stream per tensor rank, and leaves the outer stream unchanged."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    outer = torch.rand(3)
    torch.manual_seed(5)
    tracker.add("inner", 11)
    with tracker.fork("inner"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), outer)
    with tracker.fork("inner"):
        assert not torch.equal(torch.rand(3), first)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), first)


@no_cuda
def test_streams_and_events_stand_in(cpu):
    stream, start, end = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        start.record()
        time.sleep(0.002)
        end.record(stream)
    assert start.elapsed_time(end) >= 1.5 and end.query() and stream == torch.cuda.default_stream()


def _uneven() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = [torch.arange(n + 1, dtype=torch.float32)[:, None] + 10 * n for n in range(size)]
    gathered = [torch.empty_like(each) for each in whole]
    dist.all_gather(gathered, whole[rank])
    assert all(torch.equal(one, other) for one, other in zip(gathered, whole, strict=True))
    reduced = torch.empty_like(whole[rank])
    dist.reduce_scatter(reduced, [each * (rank + 1) for each in whole])
    assert torch.equal(reduced, whole[rank] * sum(range(1, size + 1)))


@no_cuda
def test_collectives_of_unequal_parts(ranks):
    """all_gather and reduce_scatter of parts with 1, 2 and 3 rows, which gloo itself refuses."""
    ranks(3, _uneven)


def test_schedule_settings_are_fields_of_megatrons_config(cpu):
    """On the CPU, the settings that gave wrong numbers are off. With several chunks, p2p calls are not batched."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    here = Device(kind="cpu", device=torch.device("cpu"), backend="gloo", name="CPU")
    there = Device(kind="cuda", device=torch.device("cuda", 0), backend="nccl", name="NVIDIA H100 80GB HBM3")
    assert set(here.safe_schedule(2)) <= names
    assert here.safe_schedule()["deallocate_pipeline_outputs"] is False
    assert "batch_p2p_comm" not in here.safe_schedule(1)
    assert there.safe_schedule(1) == {"batch_p2p_sync": False}
    for each in (here, there):
        assert each.safe_schedule(2).items() >= {"overlap_p2p_comm": True, "batch_p2p_comm": False}.items()


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GB200", 2.5e15),
        ("CPU", None),
    ],
)
def test_peak_flops(name, flops):
    assert Device(kind="cuda", device=torch.device("cuda"), backend="nccl", name=name).peak_flops() == flops


@no_cuda
def test_peak_memory_counts_what_was_resident(cpu):
    """In bytes, not kilobytes: 64 MiB of touched memory is seen."""
    before = cpu.peak_memory_bytes()
    held = torch.ones(max(before // 4, 64 << 20) // 4 + (before // 4))
    assert cpu.peak_memory_bytes() >= held.numel() * 4


@no_cuda
def test_device_contexts_still_work(cpu):
    """`with torch.device(...)` reaches factory functions under the facade. transformers builds models on "meta" with it. A context without
    an effect left rotary frequencies uninitialised, without an error."""
    with torch.device("meta"):
        for made in (torch.empty(1), torch.zeros(1), torch.arange(2), torch.tensor(1.0), torch.ones(1)):
            assert made.device.type == "meta"
