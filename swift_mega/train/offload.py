"""The inputs of decoder layers wait for the backward pass in host memory, so that the device holds two of them however many layers it has.

With full recomputation a layer saves its input alone, [tokens / s, 1, hidden]. It is copied to the host while the next layer computes,
and fetched back while the layer behind it is recomputed. Autograd hands over what is saved and asks for it again
(torch.autograd.graph.saved_tensors_hooks).

Megatron's own `cpu_offloading` needs Transformer Engine, excludes recomputation, and moves everything that a layer saves.

Without CUDA the same calls run, and the streams of device/cpu_facade.py do each copy at once. Not run yet: real streams, pinned memory.
The order in which streams wait is tested against stand-ins that copy as late as CUDA may.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

HOST = torch.device("cpu")


class Bus:
    """Copies between the device and the host, in both directions on one stream beside the computing one.

    One stream keeps the order of copies that touch the same memory. Device memory is taken and given back in the order of the computing
    stream, which waits for a copy before what it read is given back. (Tensor.record_stream would do without that wait, but then
    memory comes back only when the host happens to look, and a host that runs ahead finds none.) Pinned memory is
    torch's: it keeps what was freed, and gives it out again once the copies of it are over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.leaving: Parked | None = None
        """The latest that left. Its memory on the device is given back when another follows."""

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """(the copy, an event after it)."""
        return self._copy(tensor, torch.empty_like(tensor, device=HOST, pin_memory=True))

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """(the copy, an event after it)."""
        target = torch.empty_like(host, device=self.device)
        _, copied = self._copy(host, target)
        return target, copied

    def _copy(self, source: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        # The source may be in the making, and the memory of the target in use, by what the computing stream was given so far.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy(source, target)
        return target, self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """What is computed from now on comes after that copy."""
        torch.cuda.current_stream(self.device).wait_event(copied)


def copy(source: Tensor, target: Tensor) -> None:
    """On the current stream."""
    target.copy_(source, non_blocking=True)


class Parked:
    """A layer's input: leaving the device, on the host, or coming back."""

    def __init__(self, bus: Bus, tensor: Tensor, before: "Parked | None") -> None:
        """before: what the backward pass needs next."""
        self.bus, self.before = bus, before
        self.wanted = 1
        self.on_device: Tensor | None = tensor
        self.on_host, self.copied = bus.to_host(tensor)
        if bus.leaving is not None:
            bus.leaving.give_back()
        bus.leaving = self

    def give_back(self) -> None:
        """Its memory on the device, once it is on the host."""
        self.bus.wait(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Starts to bring it back, where somebody still wants it and it is not there."""
        if self.on_device is None and self.wanted > 0:
            self.on_device, self.copied = self.bus.to_device(self.on_host)

    def take(self) -> Tensor:
        """The tensor on the device, for what is computed from now on; the one before it sets out."""
        self.wanted = max(self.wanted, 1)  # again, where a graph is kept
        self.fetch()
        self.bus.wait(self.copied)
        tensor, self.on_device = self.on_device, None
        assert tensor is not None
        self.wanted -= 1
        if self.bus.leaving is self:
            self.bus.leaving = None
        if self.before is not None:
            self.before.fetch()
        return tensor


class _Pass:
    """What the layers of one chunk save of one microbatch."""

    def __init__(self, bus: Bus, received: Tensor | None) -> None:
        self.bus, self.received = bus, received
        self.last: Parked | None = None
        self.seen: dict[Any, Parked] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Called when autograd saves a tensor; what it returns is saved."""
        if not tensor.is_floating_point() or self._held_elsewhere(tensor):
            return tensor
        # A storage's address is given to another only when nobody refers to it, weakly either.
        place = (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride())
        parked = self.seen.get(place)
        if parked is None:
            parked = self.last = self.seen[place] = Parked(self.bus, tensor, self.last)
        else:
            parked.wanted += 1
        return parked

    def _held_elsewhere(self, tensor: Tensor) -> bool:
        """Parameters, their views, and what a stage received, which the pipeline's schedule keeps for its gradient."""
        parameter = isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)
        received = (
            self.received is not None and tensor.untyped_storage()._cdata == self.received.untyped_storage()._cdata
        )
        return parameter or received


def _unpack(saved: Any) -> Tensor:
    return saved.take() if isinstance(saved, Parked) else saved


class _Layers:
    """The part of a block's forward pass between its beginning and the final norm."""

    def __init__(self, block: Any, bus: Bus) -> None:
        self.bus = bus
        self.hooks: saved_tensors_hooks | None = None
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end, always_call=True)
        if block.final_layernorm is not None:  # its input is the first that the backward pass asks for
            block.final_layernorm.register_forward_pre_hook(self._end)

    def _begin(self, block: Any, given: Any) -> None:
        if block.training and torch.is_grad_enabled():  # otherwise nothing is recomputed, and there is no backward pass
            one = _Pass(self.bus, block.input_tensor)
            self.hooks = saved_tensors_hooks(one.pack, _unpack)
            self.hooks.__enter__()

    def _end(self, *_: Any) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks = None


def offload_layer_inputs(chunks: Sequence[Any], device: torch.device) -> Bus:
    """From now on, for every chunk of a rank's part of the model. Its decoder recomputes every layer."""
    bus = Bus(device)
    for chunk in chunks:
        _Layers(chunk.decoder, bus)
    return bus
