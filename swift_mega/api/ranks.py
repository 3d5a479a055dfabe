"""What a started rank runs. The process that starts ranks has a device of its own, which is none of theirs, so it hands none over."""

from collections.abc import Callable
from typing import Any, TypeVar

from swift_mega.device import device as devices

Result = TypeVar("Result")


def on_device(body: Callable[..., Result], first: Any, *rest: Any) -> Result:
    """`body(first, device, *rest)` with the device of the rank that calls this."""
    return body(first, devices.setup(), *rest)
