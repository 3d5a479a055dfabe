"""The device that this process computes on, found once per rank.

Without CUDA, unmodified Megatron-core runs on the CPU by a table of patches (cpu_facade.py). They must be installed before Megatron is
imported.
"""

import os
import resource
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.utils._device
from packaging.version import Version
from torch import Tensor

from swift_mega.device import cpu_facade, without_te
from swift_mega.device.backends import TE_DTYPES, transformer_engine
from swift_mega.device.cpu_facade import CPU
from swift_mega.device.local_rank import device_index, find_local_rank
from swift_mega.device.peak_flops import PEAK_FLOPS
from swift_mega.device.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where tensors live, and the torch.distributed backend that moves them."""

    kind: Literal["cuda", "cpu"]
    device: torch.device
    backend: Literal["nccl", "gloo"]
    name: str

    def uses_transformer_engine(self, dtype: torch.dtype) -> bool:
        """Whether the layers of a model of this dtype are Transformer Engine's modules. Otherwise they are Megatron's local modules."""
        return self.kind == "cuda" and dtype in TE_DTYPES and transformer_engine().version is not None

    def peak_memory_bytes(self) -> int:
        """CUDA: the most bytes that torch had reserved. CPU: the most that this process had resident."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def peak_allocated_bytes(self) -> int | None:
        """CUDA: the most bytes that tensors took, which is what `plan` estimates; the rest of the reserved memory is free. CPU: None."""
        return torch.cuda.max_memory_allocated(self.device) if self.kind == "cuda" else None

    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of this device, or None where it is not known (a CPU, another GPU)."""
        return next((flops for name, flops in PEAK_FLOPS.items() if name in self.name), None)

    def safe_schedule(self, virtual: int = 1) -> dict[str, Any]:
        """Fields of TransformerConfig that give correct numbers on this device.

        On gloo, interleaving of two stages with batched point-to-point calls gives a wrong loss without an error. So calls are made one
        by one, and overlapped. On the CPU such calls corrupt freed outputs (0.16.1). The fusions are CUDA kernels; models/fusions.py
        says which of them are on with CUDA.

        On CUDA Megatron waits for the whole device after each batched call (batch_p2p_sync, p2p_communication.py:398), because of a race
        in torch before 1.13: work objects recorded NCCL's streams before the calls were issued, so waiting for them waited for nothing
        (pytorch #82450). Megatron-core needs torch 2.6, where waiting for the calls is enough.
        """
        interleaved = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if virtual > 1 else {}
        if self.kind == "cuda":
            return interleaved | {"batch_p2p_sync": False}
        fusions = (
            "gradient_accumulation_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "apply_rope_fusion",
            "masked_softmax_fusion",
            "persist_layer_norm",
        )
        return interleaved | {"deallocate_pipeline_outputs": False} | dict.fromkeys(fusions, False)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to CUDA goes through pinned memory, so that the host does not wait for it to arrive."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def setup(*, starts_ranks: bool = False) -> Device:
    """This process's device. Without CUDA, installs the facade first. Call it before Megatron is imported; later calls are free.

    The device is the one of the local rank, and becomes torch's current device.
    starts_ranks: this process only starts ranks and is no rank itself. It then does not touch the GPUs, and the device has no name. A
    CUDA context would take some hundred MB of the first GPU, and would keep a GPU in exclusive mode from its rank.
    Raises UserError where Megatron was imported too early, RuntimeError where a patch no longer fits it.
    """
    quiet()
    # One queue to the GPU, so that a collective starts before the matrix product it overlaps with (tensor_parallel/layers.py:727).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        _set_allocator(os.environ)
        alone = starts_ranks and not _is_rank()
        device = Device(kind="cuda", device=_cuda(0), backend="nccl", name="CUDA") if alone else _own_device()
        # Last, because importing Transformer Engine may query the capabilities of the current GPU.
        without_te.install()
        return device
    cpu_facade.install()
    without_te.install()
    return Device(kind="cpu", device=CPU, backend="gloo", name="CPU")


def unused_gpus(folder: Path = Path("/dev")) -> str | None:
    """A message where this machine has GPUs that torch does not see: they are not used, why, and the remedy. None where all is well.

    folder: of device files. If CUDA_VISIBLE_DEVICES is set to nothing, this is intended.
    """
    files = sorted(str(path) for path in folder.glob("nvidia[0-9]*"))
    if not files or has_cuda() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    here = f"this machine has {', '.join(files)}, and ranks run on the CPU: torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{here} is a build without CUDA; install one with it (`make venv TORCH=...`, README.md), or set CUDA_VISIBLE_DEVICES="
    return f"{here} cannot use them (CUDA {torch.version.cuda}); see `nvidia-smi` for the driver's version, or set CUDA_VISIBLE_DEVICES="


def has_cuda() -> bool:
    """Whether this torch is built for CUDA and there is a GPU. Asks the driver's library (NVML), which creates no CUDA context."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.version.cuda is not None and torch.cuda.is_available()


def _set_allocator(environ: MutableMapping[str, str]) -> None:
    """Makes the segments of torch's CUDA allocator expandable, unless the user configures it. torch reads this when CUDA is first used.

    Rows differ in length. With segments of fixed size, a longer row finds no room in the pieces that shorter rows left.
    """
    if not any(environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # torch 2.9 introduced the shorter name, and warns about the longer one.
        name = "PYTORCH_ALLOC_CONF" if Version(torch.__version__) >= Version("2.9") else "PYTORCH_CUDA_ALLOC_CONF"
        environ[name] = "expandable_segments:True"


def _is_rank() -> bool:
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or _in_group()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_device() -> Device:
    """The GPU of this process, made the current one. NCCL uses the current device, and hangs where two ranks have the same one."""
    environ = dict(os.environ)
    if "RANK" not in environ and _in_group():  # the caller made the process group
        environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    index = device_index(find_local_rank(environ), torch.cuda.device_count())
    if torch.cuda.is_initialized() and torch.cuda.current_device() > 0:
        index = torch.cuda.current_device()  # the caller chose it
    torch.cuda.set_device(index)
    return Device(kind="cuda", device=_cuda(index), backend="nccl", name=torch.cuda.get_device_name(index))


def _cuda(index: int) -> torch.device:
    return torch.device("cuda", index)
