"""The process that uses the GPU: `python -m benchmarks.gpu_check.worker RECORD COMMAND COMMIT [--small] STAGE…`.

benchmarks/gpu_session.py starts it, and starts another for the stages that are left where this one ends before its last.
"""

import argparse
import importlib
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check.record import Record
from swift_mega.device import device as devices

if TYPE_CHECKING:
    from benchmarks.gpu_check.bench import Bench

BROKEN = 70
"""Status: a stage left the GPU's context unusable, as an illegal memory access does, so the next needs a fresh process."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("command")
    parser.add_argument("commit")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("stages", nargs="+")
    given = parser.parse_args()
    device = devices.setup()  # before anything below imports Megatron
    from benchmarks.gpu_check.bench import Bench

    record = Record(given.record)
    record.found["device"] = device.name
    with tempfile.TemporaryDirectory(prefix="swift-mega-gpu-") as folder:
        bench = Bench(device, given.small, Path(folder))
        _group_of_one(device)
        for name in given.stages:
            if not _run_stage(bench, record, name, command=given.command, commit=given.commit):
                return BROKEN
    return 0


def _group_of_one(device: devices.Device) -> None:
    """torch.distributed's group of this process alone, for as long as it lives."""
    import torch
    import torch.distributed as dist

    if device.kind == "cuda":
        torch.cuda.set_device(device.device)
    dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)


def _run_stage(bench: "Bench", record: Record, name: str, **about: str) -> bool:
    """False where no further stage can run in this process."""
    stage, error = record.begin(name, **about), None
    # Whatever a stage dies of, the others are worth their minutes on the GPU.
    try:
        importlib.import_module(f"benchmarks.gpu_check.{name}").run(bench, stage)
    except Exception:
        error = traceback.format_exc()
        print(error, flush=True)
    usable = _usable(bench)
    record.end(name, error)
    print(f"{name:10} {'took' if error is None else 'failed after'} {record.stages[name]['seconds']} s", flush=True)
    return usable


def _usable(bench: "Bench") -> bool:
    """Whether the device still answers."""
    try:
        bench.synchronize()
        bench.free()
    except RuntimeError as error:
        print(f"the GPU does not answer in this process any more: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
