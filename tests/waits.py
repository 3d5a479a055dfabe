"""Finds on the CPU where the host would wait for a GPU: reads of values of device tensors, and results whose size depends on such values.

The device's tensors are those of the model and the optimizer, what `device.send` returns, and whatever is computed from either. Reading
the value of such a tensor, or computing a result whose size depends on its values, drains the queue of a GPU. The same calls on other
tensors concern the host alone and are not counted.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swift_mega.device import device

SIZED_BY_VALUES = (
    "_local_scalar_dense nonzero masked_select argwhere is_nonzero equal allclose bincount "
    "_unique _unique2 unique_dim unique_consecutive"
).split()
"""aten operators that read a value, or whose result's size depends on a value."""
METHODS = (Tensor.cpu, Tensor.tolist, Tensor.numpy)
"""Functions that copy to the host; on a CPU tensor they call no operator."""
PACKAGES = ("swift_mega", "megatron")


class Waits(TorchDispatchMode):
    """While it is entered, `found` counts waits by "file:function" of the innermost frame in swift_mega or Megatron."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._held: dict[int, Any] = {}
        """Storages of device tensors by address. They are kept alive, so that no other storage gets the address."""

    def put(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = storage

    def holds(self, tensors: Iterable[Any]) -> bool:
        return any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._held for x in tensors)

    def wait(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            parts = Path(frame.f_code.co_filename).parts
            for package in PACKAGES:
                if package in parts and "tests" not in parts:
                    name = "/".join(parts[len(parts) - parts[::-1].index(package) :])
                    self.found[f"{name}:{frame.f_code.co_name}"] += 1
                    return
            frame = frame.f_back
        self.found["elsewhere"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.holds(tree_leaves((args, kwargs)))
        if here and _waits(func, args, kwargs):
            self.wait()
        out = func(*args, **kwargs)
        if here:
            self.put(tree_leaves(out))
            if func._schema.is_mutable:
                self.put(args[:1])
        return out


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and "Tensor" in func._overloadname
    if name in ("index", "index_put", "_index_put_impl"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in SIZED_BY_VALUES


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and self.waits.holds(args[:1]):
            self.waits.wait()
            with torch._C._DisableTorchDispatch():
                return args[0].detach().clone() if func is Tensor.cpu else func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(on_device: Iterable[Tensor]) -> Iterator[Counter[str]]:
    """Counts the waits of what runs inside. on_device: tensors that the device holds from the start."""
    mode = Waits()
    mode.put(on_device)

    def send(tensor: Tensor, where: torch.device) -> Tensor:
        if mode.holds([tensor]):
            return tensor
        sent = tensor.clone()
        mode.put([sent])
        return sent

    users = [module for module in list(sys.modules.values()) if getattr(module, "send", None) is device.send]
    with ExitStack() as stack:
        for user in users:
            stack.enter_context(patch.object(user, "send", send))
        stack.enter_context(mode)
        stack.enter_context(_Methods(mode))
        yield mode.found
