"""Sets this process's device up. Every module of this folder that may import Megatron imports this one first, or another that does.

Megatron binds CUDA's functions when it is imported, and without CUDA they are replaced before that (device/cpu_facade.py).
"""

from collections.abc import Callable
from typing import Any, TypeVar

from swift_mega.device import device as devices

DEVICE = devices.setup(starts_ranks=True)
Result = TypeVar("Result")


def on_device(body: Callable[..., Result], first: Any, *rest: Any) -> Result:
    """Returns `body(first, device, *rest)`, with the device of the calling rank, which does not get one from the process that starts it."""
    return body(first, devices.setup(), *rest)
