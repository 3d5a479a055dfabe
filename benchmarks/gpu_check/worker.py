"""The process that uses the GPU: `python -m benchmarks.gpu_check.worker RECORD COMMAND COMMIT [--small] STAGE…`.

benchmarks/gpu_session.py starts it. Where it ends before its last stage, gpu_session.py starts another one for the remaining stages.
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
"""Exit status: a stage made the GPU's context unusable, for example by an illegal memory access, so the next one needs a new process."""


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("command")
    parser.add_argument("commit")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("stages", nargs="+")
    given = parser.parse_args()
    # Has to run before an import below imports Megatron.
    device = devices.setup()
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
    """Initialises torch.distributed with this process as the only rank, until the process ends."""
    import torch
    import torch.distributed as dist

    if device.kind == "cuda":
        torch.cuda.set_device(device.device)
    dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)


def _run_stage(bench: "Bench", record: Record, name: str, **about: str) -> bool:
    """Runs a stage; returns False where no further stage can run in this process."""
    stage, error = record.begin(name, **about), None
    # All exceptions are caught, because the other stages are useful even if one fails.
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
    """Whether the device still works."""
    try:
        bench.synchronize()
        bench.free()
    except RuntimeError as error:
        print(f"the GPU no longer works in this process: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
