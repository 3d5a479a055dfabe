"""The device that this process computes on, and the facade that lets unmodified Megatron-core run where there is no CUDA.

Megatron asks torch for CUDA in few ways: a device, streams, random state, type names. The facade answers each of these for
the CPU. It is a table: what is replaced, by what, and the line of Megatron-core 0.16.1 that needs it. Every target is
looked up before anything is replaced, so that a Megatron or torch without one fails at once, by the name of the patch.
Three more patches (WITHOUT_TE) are for Megatron where Transformer Engine is absent, on CUDA too.
"""

import contextlib
import functools
import importlib
import logging
import os
import queue
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.utils._device
from packaging.version import Version
from torch import Tensor

from swift_mega.backends import TE_DTYPES, transformer_engine
from swift_mega.errors import UserError
from swift_mega.host_side import two_sides
from swift_mega.local_rank import device_index, find_local_rank
from swift_mega.many_tensors import in_place_of, l2_norm, scale

CPU = torch.device("cpu")

# Dense bfloat16 FLOP/s, without sparsity, from NVIDIA's data sheets; the first name that the device's name contains counts.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "B100": 1.75e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where tensors live, and the torch.distributed backend that moves them."""

    kind: Literal["cuda", "cpu"]
    device: torch.device
    backend: Literal["nccl", "gloo"]
    name: str

    def uses_transformer_engine(self, dtype: torch.dtype) -> bool:
        """Whether the layers of a model of this dtype are Transformer Engine's; elsewhere they are Megatron's local modules."""
        return self.kind == "cuda" and dtype in TE_DTYPES and transformer_engine().version is not None

    def peak_memory_bytes(self) -> int:
        """CUDA: the most that torch had reserved. CPU: the most that this process had resident."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def peak_allocated_bytes(self) -> int | None:
        """CUDA: the most that tensors had, which is what `plan` counts; the rest of what is reserved is free for later ones. CPU: None."""
        return torch.cuda.max_memory_allocated(self.device) if self.kind == "cuda" else None

    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of this device, or None where it is not known (a CPU, another GPU)."""
        return next((flops for name, flops in PEAK_FLOPS.items() if name in self.name), None)

    def safe_schedule(self, virtual: int = 1) -> dict[str, Any]:
        """Fields of TransformerConfig that give right numbers on this device.

        Interleaving of two stages with batched point-to-point calls gives a wrong loss on gloo without an error, so
        calls are made one by one, and overlapped. Freed outputs are corrupted by such calls on the CPU (0.16.1). The
        fusions are CUDA kernels; which of them are on there, models/fusions.py says.

        On CUDA Megatron waits for the whole device after each batched call (batch_p2p_sync, p2p_communication.py:398), against a race of
        torch before 1.13: work objects took note of NCCL's streams before the calls were issued, so that waiting for them waited for
        nothing (pytorch #82450). Megatron-core needs torch 2.6, where waiting for the calls is enough.
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
    """`tensor` on `device`; to CUDA through a copy in pinned memory, so that the host does not wait for the copy to arrive."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def c_compiler() -> str | None:
    """The C compiler that Triton would take: what CC names, else clang or gcc on PATH; None: there is none."""
    return os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")


def setup(*, starts_ranks: bool = False) -> Device:
    """This process's device; without CUDA, installs the facade first. Call it before Megatron is imported; again is free.

    The device is the one of the local rank, and becomes torch's current device.
    starts_ranks: a process that is no rank itself leaves the GPUs alone, and the device has no name: a context takes some hundred MB of
    the first GPU, and one in exclusive mode would be taken from its rank.
    Raises UserError where Megatron was imported too early, RuntimeError where a patch no longer fits it.
    """
    _quiet()
    # One queue to the GPU, so that a collective starts before the product it overlaps with (tensor_parallel/layers.py:727).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        _set_allocator(os.environ)
        alone = starts_ranks and not _is_rank()
        device = Device(kind="cuda", device=_cuda(0), backend="nccl", name="CUDA") if alone else _own_device()
        _install_without_te()  # last, since Transformer Engine may ask the current GPU what it can do when it is imported
        return device
    _install_facade()
    _install_without_te()
    return Device(kind="cpu", device=CPU, backend="gloo", name="CPU")


def unused_gpus(folder: Path = Path("/dev")) -> str | None:
    """Where this machine has GPUs that torch does not see: that they are not used, why, and what to do about it. None where all is well.

    folder: of device files. CUDA_VISIBLE_DEVICES, where it is set to nothing, says that this is meant.
    """
    files = sorted(str(path) for path in folder.glob("nvidia[0-9]*"))
    if not files or has_cuda() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    here = f"this machine has {', '.join(files)}, and ranks run on the CPU: torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{here} is a build without CUDA; install one with it (`make venv TORCH=...`, README.md), or set CUDA_VISIBLE_DEVICES="
    return f"{here} cannot use them (CUDA {torch.version.cuda}); see `nvidia-smi` for the driver's version, or set CUDA_VISIBLE_DEVICES="


def has_cuda() -> bool:
    """Whether this torch is built for CUDA and there is a GPU. Asks the driver's library (NVML), which makes no context."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.version.cuda is not None and torch.cuda.is_available()


def _set_allocator(environ: MutableMapping[str, str]) -> None:
    """Let torch's CUDA allocator grow its segments, unless the user configures it; it reads the environment when CUDA is first used.

    Rows differ in length. With segments of fixed size a longer row finds no room in the pieces that shorter ones left.
    """
    if not any(environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        # 2.9 introduced the shorter name and warned of the longer one.
        name = "PYTORCH_ALLOC_CONF" if Version(torch.__version__) >= Version("2.9") else "PYTORCH_CUDA_ALLOC_CONF"
        environ[name] = "expandable_segments:True"


def _is_rank() -> bool:
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or _in_group()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_device() -> Device:
    """The GPU of this process, which becomes the current one: NCCL takes the current device, and hangs where two ranks have the same."""
    environ = dict(os.environ)
    if "RANK" not in environ and _in_group():  # a caller's own
        environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    index = device_index(find_local_rank(environ), torch.cuda.device_count())
    if torch.cuda.is_initialized() and torch.cuda.current_device() > 0:
        index = torch.cuda.current_device()  # somebody chose it
    torch.cuda.set_device(index)
    return Device(kind="cuda", device=_cuda(index), backend="nccl", name=torch.cuda.get_device_name(index))


def _cuda(index: int) -> torch.device:
    return torch.device("cuda", index)


# What Megatron makes Python say, over and over, about packages that are optional here and about its own use of torch.
_KNOWN_WARNINGS = (
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\."),
    (r"full scope is deprecated", r"megatron\."),
    (r"MimoModelConfig is experimental", r"megatron\."),  # since 0.19, from an import of GPTModel
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\."),
    (r"`load_state_dict` is deprecated", r"megatron\."),
    (r"Please use DTensor", r"torch\.distributed\.checkpoint"),
    (r"`is_gradient_checkpointing` is deprecated", r"transformers\."),
    (r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", r"torch\.distributed\.c10d_logger"),
)
_KNOWN_LOGS = (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # since 0.19
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.torch", "async save is deprecated"),
)


@functools.cache
def _quiet() -> None:
    for message, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for logger, text in _KNOWN_LOGS:
        _drop_log(logger, text)


def _drop_log(logger: str, text: str) -> None:
    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger(logger).addFilter(passes)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One reason to replace things, and the things: target -> what to put there, given what is there.

    A target is "module:attribute" or "module:Class.attribute"; "a|b" is whichever of the two names exists, and a trailing
    "?" makes the target one that may be absent.
    """

    name: str
    reason: str
    targets: Mapping[str, Callable[[Any], Any]]

    def install(self) -> None:
        """Look up every target, then replace each; RuntimeError with this patch's name if one is gone."""
        found = [(*self._find(target), make) for target, make in self.targets.items()]
        for owner, attribute, make in found:
            setattr(owner, attribute, make(getattr(owner, attribute, None)))

    def _find(self, target: str) -> tuple[Any, str]:
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, names = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        for name in names.rstrip("?").split("|"):
            if hasattr(owner, name) or names.endswith("?"):
                return owner, name
        raise RuntimeError(
            f"the patch {self.name!r} (swift_mega/device.py) replaces {target}, which is not there: this version of Megatron-core or "
            f"torch is not supported. The patch is for: {self.reason}"
        )


@functools.cache
def _install_facade() -> None:
    if "megatron.core" in sys.modules:
        raise UserError(
            "megatron.core was imported before swift_mega.device.setup(), and binds CUDA functions when it is imported: "
            "call swift_mega.device.setup() first, in a new process"
        )
    # torch.compile'd helpers (megatron/core/jit.py:20) would die with "Expected a cuda device, but got: cpu". Megatron
    # decorates them when it is imported, and torch reads this at each decoration (_dynamo/eval_frame.py).
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The CPU has one generator, so dropout inside Megatron's forked random state does move "the CPU's".
    _drop_log("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")
    # `with torch.device(...)` looks factories up in a set that torch builds from its own names at first use. Built after the
    # patch it would hold our wrappers, and the context would do nothing: transformers then loads models with buffers unset.
    torch.utils._device._device_constructors()
    for patch in PATCHES:
        patch.install()


@functools.cache
def _install_without_te() -> None:
    if transformer_engine().version is None:
        for patch in WITHOUT_TE:
            patch.install()


def _is(value: Any) -> Callable[[Any], Any]:
    """A replacement that does not depend on what it replaces."""
    return lambda original: value


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> Tensor:
        if "device" in options and options["device"] is not None and torch.device(options["device"]).type == "cuda":
            options["device"] = CPU
        if options.get("pin_memory"):
            options["pin_memory"] = False
        return factory(*args, **options)

    return make


class _Event:
    """A CUDA event where everything has already happened when it is recorded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end.seconds - self.seconds) * 1e3


class _Stream:
    """A CUDA stream where work is done as soon as it is given; all are the same one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return hash(_Stream)


class _Generators:
    """torch.cuda.default_generators with the CPU's generator for every device."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_of(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if not args and not options and tensor.dtype in _CUDA_TYPES:
            return _CUDA_TYPES[tensor.dtype]
        return original(tensor, *args, **options)

    return type_of


def _host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's maybe_move_tensor_to_cpu, which converts to numpy only what is on CUDA; split sizes must be numbers."""
    if not torch.is_tensor(tensor):
        return tensor
    return tensor.cpu().numpy() if as_numpy else tensor.cpu()


def _uneven_all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({each.shape for each in tensor_list}) <= 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op, "an uneven all_gather is done at once on the CPU"
        padded = tensor.new_zeros((max(each.shape[0] for each in tensor_list), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        original(gathered, padded, group=group)
        for each, rows in zip(tensor_list, gathered, strict=True):
            each.copy_(rows[: each.shape[0]])

    return all_gather


def _uneven_reduce_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        output: Tensor, input_list: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({each.shape for each in input_list}) <= 1:
            return original(output, input_list, op=op, group=group, async_op=async_op)
        assert not async_op, "an uneven reduce_scatter is done at once on the CPU"
        rows = torch.cat(input_list)
        dist.all_reduce(rows, op=op, group=group)
        output.copy_(rows.split([each.shape[0] for each in input_list])[dist.get_rank(group)])

    return reduce_scatter


def _results_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.cache(lambda *mode: queue.Queue())


_NOTHING = _is(lambda *args, **options: None)
_ITSELF = _is(lambda self, *args, **options: self)
_STREAM = _is(lambda *args, **options: _Stream())
_GET_STATE = _is(lambda device="cuda": torch.default_generator.get_state())
_SET_STATE = _is(lambda state, device="cuda": torch.default_generator.set_state(state))
_MOE = "megatron.core.transformer.moe."

# Lines are those of Megatron-core 0.16.1. The patches of torch come first: importing Megatron binds some of their targets.
PATCHES = (
    Patch(
        name="current device",
        reason="tensors are made with device=torch.cuda.current_device(), tensor_parallel/random.py:102 and 100 others",
        targets={"torch.cuda:current_device": _is(lambda: CPU)},
    ),
    Patch(
        name="factories",
        reason='device="cuda" is written out, optimizer/optimizer.py:481, 907; pin_memory, rope_utils.py:62',
        targets={f"torch:{name}": _on_cpu for name in ("tensor", "zeros", "ones", "empty", "empty_like")},
    ),
    Patch(
        name="to CUDA",
        reason=".cuda() on tensors, language_module.py:244 (tied weights of a pipeline), rope_utils.py:64",
        targets={"torch:Tensor.cuda": _ITSELF},
    ),
    Patch(
        name="synchronize",
        reason="after point-to-point calls and before a checkpoint is written, p2p_communication.py:398",
        targets={"torch.cuda:synchronize": _NOTHING},
    ),
    Patch(
        name="streams",
        reason="side streams of the MoE dispatcher, token_dispatcher.py:445, and of DDP, param_and_grad_buffer.py:417",
        targets={
            "torch.cuda:Stream": _is(_Stream),
            "torch.cuda:Event": _is(_Event),
            "torch.cuda:current_stream": _STREAM,
            "torch.cuda:default_stream": _STREAM,
            "torch.cuda:stream": _is(lambda stream: contextlib.nullcontext()),
            "torch:Tensor.record_stream": _NOTHING,
        },
    ),
    Patch(
        name="random state",
        reason="tensor-parallel dropout forks CUDA's random state, tensor_parallel/random.py:235",
        targets={
            "torch.cuda:default_generators": _is(_Generators()),
            "torch.cuda:get_rng_state": _GET_STATE,
            "torch.cuda.random:get_rng_state": _GET_STATE,
            "torch.cuda:set_rng_state": _SET_STATE,
            "torch.cuda:manual_seed": _is(lambda seed: torch.default_generator.manual_seed(int(seed))),
            "torch.cuda:_lazy_call": _is(lambda call, **options: call()),  # would wait for CUDA for ever
            "torch.cuda:_lazy_init": _NOTHING,
        },
    ),
    Patch(
        name="type names",
        reason='parameters are told apart by "torch.cuda.FloatTensor", clip_grads.py:167, distrib_optimizer.py:361',
        targets={"torch:Tensor.type": _cuda_type},
    ),
    Patch(
        name="uneven collectives",
        reason="expert tensor parallelism gathers unequal parts, which gloo has not, tensor_parallel/mappings.py:150, 193",
        targets={
            "torch.distributed:all_gather": _uneven_all_gather,
            "torch.distributed:reduce_scatter": _uneven_reduce_scatter,
        },
    ),
    Patch(
        name="MoE split sizes",
        reason="sizes stay tensors where they are on the CPU already, mappings.py:444 wants numbers",
        targets={
            _MOE + "moe_utils:maybe_move_tensor_to_cpu": _is(_host_copy),
            _MOE + "token_dispatcher:maybe_move_tensor_to_cpu": _is(_host_copy),
        },
    ),
    Patch(
        name="optimizer offload",
        reason="parameters are sorted by is_cuda, cpu_offloading/hybrid_optimizer.py:273; those that are not on CUDA have no host copy, "
        "and their gradients are looked for by host copy, :101 (KeyError)",
        targets={
            "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:"
            "HybridDeviceOptimizer._get_sub_optimizer_param_groups": two_sides
        },
    ),
    Patch(
        name="checkpoint queue",
        reason="the first save starts a manager process that imports the main script again, filesystem_async.py:54; "
        "saves are synchronous on the CPU",
        targets={
            "megatron.core.dist_checkpointing.strategies.filesystem_async:"
            "_get_write_results_queue|get_write_results_queue": _results_queue
        },
    ),
)

# Megatron-core 0.16.1 again. 0.19 has none of the first three faults, and their patches change nothing there.
WITHOUT_TE = (
    Patch(
        name="MoE router",
        reason="0.16.1 does not define this name without Transformer Engine, moe_utils.py:1192",
        targets={_MOE + "moe_utils:te_general_gemm?": _is(None)},
    ),
    Patch(
        name="latent attention",
        reason="says it has Transformer Engine where that is absent, and asks isinstance(…, None), multi_latent_attention.py:185",
        targets={"megatron.core.transformer.multi_latent_attention:HAVE_TE": _is(False)},
    ),
    Patch(
        name="optimizer precision",
        reason="asks whether no version of Transformer Engine is at least 2.1 (TypeError), optimizer/optimizer_config.py:383",
        targets={"megatron.core.optimizer.optimizer_config:is_te_min_version": _is(lambda *args, **options: False)},
    ),
    Patch(
        name="gradient norm",
        reason="the host reads the norm of each parameter's gradient where Apex is absent too, utils.py:1205",
        targets={
            "megatron.core.optimizer.clip_grads:l2_norm_impl": in_place_of("local_multi_tensor_l2_norm", l2_norm),
            "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl": in_place_of(
                "local_multi_tensor_scale", scale
            ),
        },
    ),
)
