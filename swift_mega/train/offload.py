"""Inputs of decoder layers are kept in host memory until the backward pass. The device holds two of them, for any number of layers.

With full recomputation a layer saves only its input, [tokens / s, 1, hidden]. The input is copied to the host while the next layer
computes, and copied back while the layer after it is recomputed. The hooks of torch.autograd.graph.saved_tensors_hooks get each tensor
that autograd saves, and return it when autograd needs it.

Megatron's `cpu_offloading` needs Transformer Engine, cannot be combined with recomputation, and moves all tensors that a layer saves.

Without CUDA the same calls run, and the streams of device/cpu_facade.py copy immediately. Not run yet: real streams, pinned memory.
The order of stream waits is tested with fake streams that copy as late as CUDA may.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

HOST = torch.device("cpu")


class HostCopies:
    """Copies between device and host, both directions on one copy stream beside the compute stream.

    One stream keeps copies of the same memory in order. Device memory is allocated and freed in the order of the compute stream: it
    waits for a copy to the host before the source is freed. (Tensor.record_stream would not need this wait, but then the allocator
    reuses memory only after the host has checked an event, and a host that runs ahead finds no free memory.) Pinned memory comes from
    torch's allocator, which reuses freed memory after its copies have finished.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.leaving: OffloadedInput | None = None
        """The input that was copied to the host last. Its device memory is freed when the next one is copied."""

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """(the copy in pinned memory, an event after the copy)."""
        return self._copy(tensor, torch.empty_like(tensor, device=HOST, pin_memory=True))

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """(the copy on the device, an event after the copy)."""
        target = torch.empty_like(host, device=self.device)
        _, copied = self._copy(host, target)
        return target, copied

    def _copy(self, source: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        # Kernels that are queued on the compute stream may still write the source, or use the memory of the target.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy(source, target)
        return target, self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """The compute stream waits for the event `copied` before its next kernel."""
        torch.cuda.current_stream(self.device).wait_event(copied)


def copy(source: Tensor, target: Tensor) -> None:
    """Copies asynchronously on the current stream."""
    target.copy_(source, non_blocking=True)


class OffloadedInput:
    """A layer's input that is on the host, or is being copied there or back."""

    def __init__(self, copies: HostCopies, tensor: Tensor, before: "OffloadedInput | None") -> None:
        """before: the input that was saved before this one; the backward pass needs it next."""
        self.copies, self.before = copies, before
        self.wanted = 1
        self.on_device: Tensor | None = tensor
        self.on_host, self.copied = copies.to_host(tensor)
        if copies.leaving is not None:
            copies.leaving.give_back()
        copies.leaving = self

    def give_back(self) -> None:
        """Frees its device memory, after the copy to the host."""
        self.copies.wait(self.copied)
        self.on_device = None

    def fetch(self) -> None:
        """Starts the copy to the device, where it is still needed and not on the device."""
        if self.on_device is None and self.wanted > 0:
            self.on_device, self.copied = self.copies.to_device(self.on_host)

    def take(self) -> Tensor:
        """The tensor on the device, ready for kernels that are queued after this call. Also starts the copy of `before`."""
        # A graph that is kept (retain_graph) takes the tensor again.
        self.wanted = max(self.wanted, 1)
        self.fetch()
        self.copies.wait(self.copied)
        tensor, self.on_device = self.on_device, None
        assert tensor is not None
        self.wanted -= 1
        if self.copies.leaving is self:
            self.copies.leaving = None
        if self.before is not None:
            self.before.fetch()
        return tensor


class _Pass:
    """The tensors that the layers of one chunk save for one microbatch."""

    def __init__(self, copies: HostCopies, received: Tensor | None) -> None:
        self.copies, self.received = copies, received
        self.last: OffloadedInput | None = None
        self.seen: dict[Any, OffloadedInput] = {}

    def pack(self, tensor: Tensor) -> Any:
        """Called when autograd saves a tensor; autograd saves the return value instead."""
        if not tensor.is_floating_point() or self._kept_elsewhere(tensor):
            return tensor
        # A weak reference is enough: while one exists, no other storage gets the same address.
        place = (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride())
        offloaded = self.seen.get(place)
        if offloaded is None:
            offloaded = self.last = self.seen[place] = OffloadedInput(self.copies, tensor, self.last)
        else:
            offloaded.wanted += 1
        return offloaded

    def _kept_elsewhere(self, tensor: Tensor) -> bool:
        """Whether something else keeps the tensor on the device: parameters, their views, and the input that a pipeline stage received,
        which the schedule keeps for its gradient.
        """
        parameter = isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter)
        received = (
            self.received is not None and tensor.untyped_storage()._cdata == self.received.untyped_storage()._cdata
        )
        return parameter or received


def _unpack(saved: Any) -> Tensor:
    return saved.take() if isinstance(saved, OffloadedInput) else saved


class _Layers:
    """Sets the hooks in the forward pass of a transformer block, from its begin up to the final norm."""

    def __init__(self, block: Any, copies: HostCopies) -> None:
        self.copies = copies
        self.hooks: saved_tensors_hooks | None = None
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end, always_call=True)
        # The input of the final norm stays on the device: the backward pass needs it first.
        if block.final_layernorm is not None:
            block.final_layernorm.register_forward_pre_hook(self._end)

    def _begin(self, block: Any, given: Any) -> None:
        # Otherwise there is no backward pass and no recomputation.
        if block.training and torch.is_grad_enabled():
            one = _Pass(self.copies, block.input_tensor)
            self.hooks = saved_tensors_hooks(one.pack, _unpack)
            self.hooks.__enter__()

    def _end(self, *_: Any) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(None, None, None)
            self.hooks = None


def offload_layer_inputs(chunks: Sequence[Any], device: torch.device) -> HostCopies:
    """Offloads layer inputs in all chunks of this rank, from now on. Every decoder layer has to be recomputed (full recomputation)."""
    copies = HostCopies(device)
    for chunk in chunks:
        _Layers(chunk.decoder, copies)
    return copies
