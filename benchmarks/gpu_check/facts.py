"""Hardware, versions, and the highest rates that this device reaches; the numbers of the other stages belong to these."""

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.record import Stage

PACKAGES = (
    "torch", "triton", "megatron-core", "transformers", "peft", "transformer-engine", "flash-attn", "apex", "numpy",
)  # fmt: skip


def run(bench: Bench, stage: Stage) -> None:
    """Runs the stage."""
    stage.fact("device", bench.device.name)
    stage.fact("python", platform.python_version())
    for name in PACKAGES:
        stage.fact(name, _version(name))
    stage.fact("C compiler", _output("gcc", "--version").partition("\n")[0] or "not found")
    if bench.on_gpu:
        query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        stage.fact("nvidia-smi", _output("nvidia-smi", *query))
        stage.fact(
            "CUDA, NCCL, cuDNN", f"{torch.version.cuda}, {torch.cuda.nccl.version()}, {torch.backends.cudnn.version()}"
        )
    _rates(bench, stage)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _rates(bench: Bench, stage: Stage) -> None:
    """Measures the highest rates of the device. On a CPU the sizes are smaller, and copies between host and device are plain copies."""
    size, copied, moved = (8192, 1 << 31, 1 << 28) if bench.on_gpu else (512, 1 << 26, 1 << 24)
    device = bench.device.device
    factor = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = bench.seconds(lambda: factor @ factor)
    stage.fact("bf16 matmul, TFLOP/s", f"{2 * size**3 / product / 1e12:.3g}")
    source = torch.empty(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    stage.fact("copy, TB/s read and written", f"{2 * copied / bench.seconds(lambda: target.copy_(source)) / 1e12:.3g}")
    host = torch.empty(moved, dtype=torch.uint8, pin_memory=bench.on_gpu)
    there = torch.empty_like(host, device=device)
    rates = [
        moved / bench.seconds(lambda to=to, of=of: to.copy_(of, non_blocking=True)) / 1e9  # type: ignore[misc]
        for to, of in ((there, host), (host, there))
    ]
    stage.fact("pinned host to device, and back, GB/s", " and ".join(f"{rate:.3g}" for rate in rates))
