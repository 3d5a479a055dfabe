"""Patches that let unmodified Megatron-core run where there is no CUDA.

Megatron asks torch for CUDA in few ways: a device, streams, random state, type names. The facade answers each of these for the CPU. It
is a table: what is replaced, by what, and the line of Megatron-core 0.16.1 that needs it. All targets of a patch are looked up before
any is replaced. So if Megatron or torch lacks one, installing fails at once, with the name of the patch.
"""

import contextlib
import functools
import os
import queue
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device
from torch import Tensor

from swift_mega.device.host_side import two_sides
from swift_mega.device.patch import Patch, replaced_by
from swift_mega.device.quiet import drop_log
from swift_mega.errors import UserError

CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Installs the patches, once. UserError where Megatron was imported before."""
    if "megatron.core" in sys.modules:
        raise UserError(
            "megatron.core was imported before swift_mega.device.device.setup(), and binds CUDA functions when it is imported: "
            "call swift_mega.device.device.setup() first, in a new process"
        )
    # torch.compile'd helpers (megatron/core/jit.py:20) would fail with "Expected a cuda device, but got: cpu". Megatron decorates them
    # when it is imported, and torch reads this variable at each decoration (_dynamo/eval_frame.py).
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The CPU has one generator, so dropout inside Megatron's forked random state changes the CPU's state, and Megatron warns of that.
    drop_log("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")
    # `with torch.device(...)` finds factory functions in a set that torch builds from its own functions at first use. If that came after
    # the patches, the set would hold our wrappers, and the context would do nothing: transformers then loads models with buffers unset.
    torch.utils._device._device_constructors()
    for patch in PATCHES:
        patch.install()


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
    """A CUDA event on the CPU: all earlier work is done when the event is recorded."""

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
    """A CUDA stream on the CPU: work is done as soon as it is submitted, and all streams are equal."""

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
    """torch.cuda.default_generators, with the CPU's generator for every device."""

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
    """In place of Megatron's maybe_move_tensor_to_cpu, which converts to numpy only what is on CUDA. Split sizes must be numbers."""
    if not torch.is_tensor(tensor):
        return tensor
    return tensor.cpu().numpy() if as_numpy else tensor.cpu()


def _uneven_all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({each.shape for each in tensor_list}) <= 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op, "an uneven all_gather has no async form on the CPU"
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
        assert not async_op, "an uneven reduce_scatter has no async form on the CPU"
        rows = torch.cat(input_list)
        dist.all_reduce(rows, op=op, group=group)
        output.copy_(rows.split([each.shape[0] for each in input_list])[dist.get_rank(group)])

    return reduce_scatter


def _results_queue(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.cache(lambda *mode: queue.Queue())


_NOTHING = replaced_by(lambda *args, **options: None)
_ITSELF = replaced_by(lambda self, *args, **options: self)
_STREAM = replaced_by(lambda *args, **options: _Stream())
_GET_STATE = replaced_by(lambda device="cuda": torch.default_generator.get_state())
_SET_STATE = replaced_by(lambda state, device="cuda": torch.default_generator.set_state(state))
_MOE = "megatron.core.transformer.moe."

# Line numbers are those of Megatron-core 0.16.1. The patches of torch come first, because importing Megatron binds some of their targets.
PATCHES = (
    Patch(
        name="current device",
        reason="tensors are made with device=torch.cuda.current_device(), tensor_parallel/random.py:102 and 100 others",
        targets={"torch.cuda:current_device": replaced_by(lambda: CPU)},
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
            "torch.cuda:Stream": replaced_by(_Stream),
            "torch.cuda:Event": replaced_by(_Event),
            "torch.cuda:current_stream": _STREAM,
            "torch.cuda:default_stream": _STREAM,
            "torch.cuda:stream": replaced_by(lambda stream: contextlib.nullcontext()),
            "torch:Tensor.record_stream": _NOTHING,
        },
    ),
    Patch(
        name="random state",
        reason="tensor-parallel dropout forks CUDA's random state, tensor_parallel/random.py:235",
        targets={
            "torch.cuda:default_generators": replaced_by(_Generators()),
            "torch.cuda:get_rng_state": _GET_STATE,
            "torch.cuda.random:get_rng_state": _GET_STATE,
            "torch.cuda:set_rng_state": _SET_STATE,
            "torch.cuda:manual_seed": replaced_by(lambda seed: torch.default_generator.manual_seed(int(seed))),
            "torch.cuda:_lazy_call": replaced_by(lambda call, **options: call()),  # would wait for CUDA for ever
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
        reason="expert tensor parallelism gathers unequal parts, which gloo does not support, tensor_parallel/mappings.py:150, 193",
        targets={
            "torch.distributed:all_gather": _uneven_all_gather,
            "torch.distributed:reduce_scatter": _uneven_reduce_scatter,
        },
    ),
    Patch(
        name="MoE split sizes",
        reason="sizes on the CPU stay tensors, and mappings.py:444 expects Python numbers",
        targets={
            _MOE + "moe_utils:maybe_move_tensor_to_cpu": replaced_by(_host_copy),
            _MOE + "token_dispatcher:maybe_move_tensor_to_cpu": replaced_by(_host_copy),
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
